"""Streams loaded weights onto a mesh: each host reads only what its devices hold."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from speechlm2_jax.conversion.mapping import Place, ReadPart


def onto(layout: Mapping[str, jax.ShapeDtypeStruct]) -> Place:
    """A `place` for `mapping.load`: every variable with the dtype and sharding of its leaf.

    On the host there is never more than the part of one tensor that is being read.
    """

    def place(
        path: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], read: ReadPart
    ) -> jax.Array:
        leaf: Any = layout[path]
        held: dict[Any, Any] = leaf.sharding.addressable_devices_indices_map(shape)
        holders_of: dict[str, list[Any]] = {}
        for device, index in held.items():
            holders_of.setdefault(str(index), []).append(device)
        parts: list[jax.Array] = []
        for holders in holders_of.values():
            part = np.asarray(read(held[holders[0]])).astype(leaf.dtype, copy=False)
            parts += [_sent(part, device) for device in holders]
        return jax.make_array_from_single_device_arrays(shape, leaf.sharding, parts)

    return place


def _sent(part: np.ndarray, device: Any) -> jax.Array:
    """Puts a part on a device and waits: until it is there the host holds it too."""
    jax_: Any = jax  # its own types are partly unknown
    sent = jax_.device_put(part, device)
    return sent.block_until_ready()
