"""Quantizes weights as they are read: a device holds one of them in full precision at a time."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.conversion.mapping import ReadPart
from speechlm2_jax.conversion.stream_to_mesh import onto
from speechlm2_jax.layers.module import VariableInfo, Variables
from speechlm2_jax.layers.quantized import SCALE_DTYPE, quantize
from speechlm2_jax.layers.quantized_layers import quantized_paths, scale_path

Layout = Mapping[str, jax.ShapeDtypeStruct]


class QuantizingPlace:
    """A `place` for `mapping.load` that quantizes the weights that `infos` has quantized.

    `infos` may have none. With `layout` every variable lies on the sharding of its leaf, else
    quantized weights lie on the default device and others on the host. `mapping.load` takes
    `unquantized(infos)`; `scales` collects what it does not return.
    """

    def __init__(self, infos: Mapping[str, VariableInfo], layout: Layout | None = None):
        self.scales: Variables = {}
        self._dtypes = {path: infos[path].dtype for path in quantized_paths(infos)}
        self._layout = layout

    def __call__(
        self, path: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], read: ReadPart
    ) -> AnyArray:
        """Places one variable."""
        if path not in self._dtypes:
            return self._placed(path, shape, None, read)
        return self.quantized(path, self._placed(path, shape, dtype, read))

    def quantized(self, path: str, value: AnyArray) -> jax.Array:
        """Quantizes the weight `path`; notes its scales."""
        jax_: Any = jax  # its own types are partly unknown
        layout, scale = self._layout, scale_path(path)
        to = None if layout is None else (layout[path].sharding, layout[scale].sharding)
        program = partial(_quantized, dtype=self._dtypes[path])
        made, scales = jax_.jit(program, out_shardings=to)(value)
        self.scales[scale] = scales
        return made.block_until_ready()  # until then the device holds `value` too

    def all(self, variables: Variables) -> Variables:
        """Places loaded variables one by one; takes them out of `variables`.

        Weights that are quantized already, as their scales among `variables` show, stay so.
        """
        done: Variables = {}
        stored = frozenset(variables)
        for path in list(variables):
            value = variables.pop(path)
            is_left = path not in self._dtypes or scale_path(path) in stored
            if isinstance(value, jax.Array):
                done[path] = value if is_left else self.quantized(path, value)
                continue
            host = np.asarray(value)
            dtype = None if is_left else host.dtype
            made = self._placed(path, host.shape, dtype, lambda index, v=host: v[index])
            done[path] = made if is_left else self.quantized(path, made)
        return done

    @property
    def floating_layout(self) -> Layout | None:
        """The layout of the variables before they are quantized; None for the host."""
        if self._layout is None:
            return None
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding)
            if path in self._dtypes
            else leaf
            for path, leaf in self._layout.items()
        }

    def _placed(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype[np.generic] | None,
        read: ReadPart,
    ) -> AnyArray:
        """A variable in full precision: in `dtype`, by default that of its leaf."""
        if self._layout is None:
            return read(tuple(slice(0, n) for n in shape))
        leaf = self._layout[path]
        if dtype is not None:
            leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)
        return onto({path: leaf})(path, shape, leaf.dtype, read)


def dequantized(variables: Variables) -> Variables:
    """Variables of the same network without quantization: quantized weights in fp32 on the host.

    Only variables that are quantized change.
    """
    made = dict(variables)
    for path in variables:
        scales = made.pop(scale_path(path), None)
        if scales is not None:
            values = np.asarray(made[path]).astype(np.float32)
            made[path] = values * np.asarray(scales).astype(np.float32)[..., None]
    return made


def _quantized(value: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    made = quantize(value, dtype, SCALE_DTYPE)
    return made.values, made.scales[..., 0]
