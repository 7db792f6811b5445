"""Flax NNX modules as a graphdef and a flat dict of variables (`split` and `merge`).

A network is an `nnx.Module`. Its variables are `nnx.Param` (may be trained) or `Buffer` (never
receives a gradient: batch-norm statistics, filterbanks). `split` turns a module into a hashable
graphdef and a flat dict `{"llm.layers.attention.query.weight": array}`; `merge` is the inverse.
Optimizer, sharding, conversion and checkpoints use this dict and know no modules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.sharding import constrain

Variables = dict[str, AnyArray]
"""Dotted path -> array. A plain dict, so every JAX transformation and library takes it."""
Axes = tuple[str | None, ...]
Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]
M = TypeVar("M", bound=nnx.Module)
LAYERS = "layers"
SCANNED = "is_scanned"
"""Attribute of what `stack` makes and `scan_layers` runs. Other modules have the axis too."""


MAY_BE_WORDS = "may_be_words"
"""Metadata of a weight whose module also reads it as words (`layers/words.py`)."""


class AbstractRngs(nnx.Rngs):
    """Takes the place of random keys where only shapes matter: initial values are zeros.

    Nothing is drawn with them, because tracing random draws takes long.
    """


class Buffer(nnx.Variable):
    """An array that belongs to a module's state but never receives a gradient."""


@dataclass(frozen=True)
class VariableInfo:
    """Shape, dtype and logical axes of a variable, without its value."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    is_buffer: bool
    keeps_dtype: bool = False
    """True: used in its own dtype, whatever the dtype of the activations (`keep_fp32`)."""

    def computed_in(self, dtype: DTypeLike) -> DTypeLike:
        """The dtype to store it in for inference, where activations have `dtype`."""
        is_cast = jnp.issubdtype(self.dtype, jnp.floating) and not self.keeps_dtype
        return dtype if is_cast else self.dtype

    @property
    def is_stacked(self) -> bool:
        """True if the leading axis numbers the layers of a stack."""
        return bool(self.axes) and self.axes[0] == LAYERS


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: Axes,
    init: Initializer,
    dtype: DTypeLike = jnp.float32,
) -> nnx.Param:
    """Makes a trainable variable. `axes`: a logical axis name per dimension (see sharding.py)."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} must name each dimension of shape {shape}")
    if isinstance(rngs, AbstractRngs):
        return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
    return nnx.Param(init(_next_rng(rngs), shape, dtype), axes=axes)


def buffer(value: ArrayLike, axes: Axes) -> Buffer:
    """Makes a variable that is part of the state but not trained."""
    return Buffer(value, axes=axes)


def keep_fp32(module: M) -> M:
    """Marks the variables of a module that computes in fp32 at any precision (a codec)."""
    for _, variable in nnx.to_flat_state(nnx.state(module)):
        variable.set_metadata(keeps_dtype=True)
    return module


def constrain_layer(layer_state: PyTree) -> PyTree:
    """Constrains one layer's variables, and so their gradients, to the sharding of their stack.

    Without it XLA may all-reduce whole gradients over all devices and slice them after the scan.
    """

    def pin(variable: nnx.Variable) -> nnx.Variable:
        value, axes = variable.get_value(), variable.get_metadata()["axes"]
        return variable.replace(constrain(value, *axes[1:]))

    return jax.tree.map(pin, layer_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def split(module: M) -> tuple[nnx.GraphDef[M], dict[str, Any]]:
    """Splits a module into its hashable graphdef and its variables by dotted path.

    The variables of an abstract module are shapes and dtypes.
    """
    graphdef, state = nnx.split(module)
    flat = {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}
    return graphdef, flat


def merge(graphdef: nnx.GraphDef[M], variables: Mapping[str, AnyArray | jax.ShapeDtypeStruct]) -> M:
    """The inverse of `split`: a module over these variables (arrays or tracers)."""
    nested = unflatten_dict(
        {tuple(_attribute_or_index(k) for k in p.split(".")): v for p, v in variables.items()}
    )
    return nnx.merge(graphdef, nnx.State(nested), copy=True)


def describe(module: nnx.Module) -> dict[str, VariableInfo]:
    """Lists every variable of a (possibly abstract) module by dotted path."""
    infos = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        value = variable.get_value()
        infos[".".join(map(str, path))] = VariableInfo(
            shape=tuple(value.shape),
            dtype=value.dtype,
            axes=tuple(variable.get_metadata()["axes"]),
            is_buffer=isinstance(variable, Buffer),
            keeps_dtype=variable.get_metadata().get("keeps_dtype", False),
        )
    return infos


def abstract(make: Callable[[nnx.Rngs], M]) -> M:
    """Builds a module whose variables are shapes and dtypes only: no memory, no device."""
    return nnx.eval_shape(lambda: make(AbstractRngs(0)))


def _next_rng(rngs: nnx.Rngs) -> jax.Array:
    """Returns what `rngs.params()` returns, but is fast while tracing.

    While tracing, Flax asks the stream's counter for its sharding, for which JAX walks over
    everything traced so far: 14 s for a network of 300 variables; 0.6 s this way.
    """
    stream = rngs.params
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key


def _attribute_or_index(part: str) -> str | int:
    return int(part) if part.isdigit() else part
