"""The devices of the arguments `device` and `devices`, and what they compute on."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.pretrained.errors import errors_name_key
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding

C = TypeVar("C", EvalConfig, DuplexEvalConfig)
M = TypeVar("M", bound="OnDevices")
_PLATFORMS = {"cuda": "gpu", "gpu": "gpu", "rocm": "gpu", "tpu": "tpu", "cpu": "cpu"}


class OnDevices(Protocol):
    """A model with weights."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices of its weights; None for one."""
        ...


def choose_devices(name: str, count: int = -1) -> list[jax.Device]:
    """The devices of a platform: auto, cpu, gpu (or cuda), tpu; one, with an index as in `gpu:1`.

    `count` of them, of each process if there are several; -1: all. Makes this process's first one
    the default. Raises SettingsError if they do not exist, listing what JAX sees; there is no
    fallback.
    """
    kind, _, index = name.lower().partition(":")
    if kind != "auto" and kind not in _PLATFORMS or (index and not index.isdigit()):
        raise SettingsError(f"device: {name!r} is unknown; use auto, cpu, gpu, cuda or tpu")
    try:
        found = jax.devices(None if kind == "auto" else _PLATFORMS[kind])
    except RuntimeError:
        found = []
    own = [d for d in found if d.process_index == jax.process_index()]
    if index:
        own = found = own[int(index) : int(index) + 1]
    if not own:
        seen = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise SettingsError(f"device: {name} not found (JAX sees {seen}); use device=auto")
    jax.config.update("jax_default_device", own[0])
    if count == -1:
        return list(found)
    if not 1 <= count <= len(own):
        raise SettingsError(f"devices={count}: there are {len(own)} devices; -1 takes all")
    taken = {device.id for device in own[:count]}
    others = [d for d in found if d.process_index != jax.process_index()]
    if others and count != len(own):
        raise SettingsError(
            f"devices={count}: several processes use all devices they have, {len(own)} here; leave "
            "devices out"
        )
    return [d for d in found if d.id in taken or d in others]


def load(config: C, from_pretrained: Callable[..., M]) -> "Loaded[M, C]":
    """Loads the model of an evaluation onto its devices; prints a line if there are several.

    `from_pretrained` is that of its class. Raises SettingsError for devices that do not exist, and
    for a model that cannot be loaded or does not fit.
    """
    devices = choose_devices(config.device, config.devices)
    placed = _placement(config, devices)
    with errors_name_key("pretrained_name"):
        model = from_pretrained(
            config.pretrained_name,
            dtype=config.dtype,
            quantize=config.quantize,
            kv_cache_dtype=config.kv_cache_dtype,
            **placed,
        )
    mesh = model.mesh
    is_joint = mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1
    if placed:
        show(_described(mesh, is_joint=is_joint))
    groups = 1 if mesh is None else Sharding(mesh).data_parallel_size
    return Loaded(
        model=model,
        config=replace(config, batch_size=config.batch_size * groups),
        device=devices[0],
        is_joint=is_joint,
    )


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[M, C]):
    """A model on its devices."""

    model: M
    config: C
    """With the batch size of all data-parallel devices together."""
    device: jax.Device
    """This process's first device."""
    is_joint: bool
    """Whether several processes compute each response together."""

    @property
    def is_split(self) -> bool:
        """Whether each of several processes generates responses of its own."""
        return jax.process_count() > 1 and not self.is_joint


def show(text: str) -> None:
    """Prints what concerns all processes: on the first of them, above a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def _placement(
    config: EvalConfig | DuplexEvalConfig, devices: Sequence[jax.Device]
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that put a model on devices; none for a single device."""
    if config.tp_size > 1:
        if config.strategy is not None:
            raise SettingsError("tp_size: strategy is set too; leave one of them out")
        strategy = {"_target_": "AutomodelParallelStrategy", "tp_size": config.tp_size}
        return {"strategy": strategy, "devices": devices}
    if config.strategy is None and len(devices) == 1:
        return {}
    return {"strategy": config.strategy or "auto", "devices": devices}


def _described(mesh: Mesh | None, *, is_joint: bool) -> str:
    """One line about the devices, for the terminal."""
    count = 1 if mesh is None else mesh.size
    share = 1 if mesh is None else count // Sharding(mesh).data_parallel_size
    what = "a copy of the weights on each" if share == 1 else f"{share} devices share a copy"
    if jax.process_count() == 1:
        return f"mesh   {count} devices, {what}"
    if is_joint:
        return f"mesh   {count} devices of {jax.process_count()} processes, {what}"
    return f"mesh   {jax.process_count()} processes with {count} devices each, {what}"
