"""Where weights lie for inference: a copy on each of several devices, or parts of one copy."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding, for_inference, make_sharding
from speechlm2_jax.strategies import read_strategy

AUTO = "auto"
WEIGHTS_SHARE = 0.75
"""The part of a device's memory that weights may take; KV cache and activations need the rest."""


def variable_layout(
    infos: Mapping[str, VariableInfo], dtype: DTypeLike, placement: Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Dtype and sharding of every variable for inference.

    Each has the dtype that it is computed in. Only training needs fp32 copies.
    """
    return {
        path: jax.ShapeDtypeStruct(
            info.shape,
            info.computed_in(dtype),
            sharding=placement.named(info.axes, info.shape),
        )
        for path, info in infos.items()
    }


def inference_sharding(
    strategy: object,
    devices: Sequence[jax.Device],
    infos: Mapping[str, VariableInfo],
    dtype: DTypeLike,
) -> Sharding:
    """The mesh for a strategy in the words of `trainer.strategy`, over `devices` of all processes.

    "auto": every device has a copy of the weights, if they fit into `WEIGHTS_SHARE` of its memory;
    else as few devices as can hold them share one copy (tensor parallelism), and the groups of such
    devices work on sequences of their own. Other strategies give the number of devices that share a
    copy. Where a process can hold copies of its own, the mesh has its devices only, and it works
    without the other processes.

    Raises SettingsError if the weights do not fit into all devices together, or if the sizes of a
    strategy do not fit the devices.
    """
    own = [d for d in devices if d.process_index == jax.process_index()]
    if strategy == AUTO:
        share = _fewest_devices(own, infos, dtype) or _fewest_devices(devices, infos, dtype)
        if share is None:
            raise SettingsError(_too_large(devices, infos, dtype))
        sizes: dict[str, Any] = {"tensor": share}
    else:
        try:
            sizes = read_strategy(strategy).mesh_sizes(len(devices))
            sizes.pop("sequence_parallel", None)  # whole sequences lie on every device
            share = math.prod(size for axis, size in sizes.items() if axis != "data")
        except SettingsError as error:
            raise SettingsError(str(error).replace("trainer.", "")) from error
    on = devices if len(own) % share else own
    sizes["data"] = len(on) // share
    return for_inference(make_sharding(**sizes, devices=on).mesh)


def _fewest_devices(
    devices: Sequence[jax.Device], infos: Mapping[str, VariableInfo], dtype: DTypeLike
) -> int | None:
    """How many devices are to share one copy of the weights; None if even all are too small."""
    count, weights = len(devices), weight_bytes(infos, dtype)
    room = WEIGHTS_SHARE * memory_bytes(devices)
    fitting = (n for n in range(1, count + 1) if count % n == 0 and weights / n <= room)
    return next(fitting, None)


def _too_large(
    devices: Sequence[jax.Device], infos: Mapping[str, VariableInfo], dtype: DTypeLike
) -> str:
    room = WEIGHTS_SHARE * memory_bytes(devices) * len(devices)
    return (
        f"the weights take {weight_bytes(infos, dtype) / 2**30:.1f} GiB in {jnp.dtype(dtype)}, and "
        f"{len(devices)} devices have room for {room / 2**30:.1f} GiB ({WEIGHTS_SHARE:.0%} of "
        "their memory); use more devices, or dtype=bfloat16"
    )


def weight_bytes(infos: Mapping[str, VariableInfo], dtype: DTypeLike) -> int:
    """Bytes of all variables as inference holds them."""
    return sum(
        math.prod(i.shape) * jnp.dtype(i.computed_in(dtype)).itemsize for i in infos.values()
    )


def memory_bytes(devices: Sequence[jax.Device]) -> float:
    """Memory of the smallest device; CPU devices share the memory of the machine."""
    stats = [device.memory_stats() or {} for device in devices if device.platform != "cpu"]
    known = [float(s["bytes_limit"]) for s in stats if "bytes_limit" in s]
    if known:
        return min(known)
    machine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return machine / max(jax.local_device_count("cpu"), 1)
