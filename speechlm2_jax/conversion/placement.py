"""Puts loaded weights straight onto a mesh: each host reads only what its devices hold."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np

from speechlm2_jax.conversion.mapping import Place, ReadPart
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.sharding import Sharding


def onto(sharding: Sharding, infos: Mapping[str, VariableInfo]) -> Place:
    """A `place` for `mapping.load` that shards every variable by its logical axes."""

    def place(path: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: ReadPart) -> jax.Array:
        placement = sharding.named(infos[path].axes, shape)
        return jax.make_array_from_callback(shape, placement, cast(Any, read), dtype=dtype)

    return place
