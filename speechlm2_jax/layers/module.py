"""Modules as values: named variables with logical axes, stacked layers, and the way back and forth.

A network is an `nnx.Module` whose variables are `Param` (what training may change) or `Buffer`
(what is carried: batch-norm statistics, filterbanks). `split` turns it into a hashable
definition and a flat dict `{"llm.layers.attention.query.weight": array}`; `merge` is the inverse.
Everything outside the modules (optimizer, sharding, conversion, checkpoints) speaks in that dict.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from speechlm2_jax.sharding import constrain, platform

Variables = dict[str, Any]
"""Dotted path -> array. A plain dict, so every JAX transformation and library takes it."""
Axes = tuple[str | None, ...]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
M = TypeVar("M", bound=nnx.Module)
LAYERS = "layers"
_LEVEL = "xla_backend_optimization_level"
_draws_nothing: ContextVar[bool] = ContextVar("draws_nothing", default=False)
"""Set by `abstract`, which would trace every draw for its shape alone."""
MOST_APART_BYTES = 6 * 2**30
"""Stacks that a loop on a CPU may hold a second time: 1.1 B parameters in fp32, or 3 B in bf16."""
_apart: ContextVar[Mapping[int, "_Apart"] | None] = ContextVar("apart", default=None)
"""Set by `read_in_place`: the layers of a stack by its id."""


class Buffer(nnx.Variable):
    """An array that belongs to a module's state but never receives a gradient."""


@dataclass(frozen=True)
class VariableInfo:
    """What is known of a variable without its values."""

    shape: tuple[int, ...]
    dtype: Any
    axes: Axes
    is_buffer: bool
    keeps_dtype: bool = False
    """Computed in its own dtype, whatever that of the activations (`keep_fp32`)."""

    def computed_in(self, dtype: Any) -> Any:
        """The dtype that its value needs where activations have `dtype` and nothing is trained."""
        is_cast = jnp.issubdtype(self.dtype, jnp.floating) and not self.keeps_dtype
        return dtype if is_cast else self.dtype

    @property
    def is_stacked(self) -> bool:
        """True if the leading axis numbers the layers of a stack."""
        return bool(self.axes) and self.axes[0] == LAYERS


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, init: Initializer, dtype: Any = jnp.float32
) -> nnx.Param:
    """Makes a trainable variable. `axes` names the meaning of each dimension (see sharding.py)."""
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes} must name each dimension of shape {shape}")
    if _draws_nothing.get():
        return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
    return nnx.Param(init(_next_key(rngs), shape, dtype), axes=axes)


def buffer(value: Any, axes: Axes) -> Buffer:
    """Makes a carried variable with the given initial value."""
    return Buffer(value, axes=axes)


def keep_fp32(module: M) -> M:
    """Marks the variables of a module that computes in fp32 under any precision (a codec)."""
    for _, variable in nnx.to_flat_state(nnx.state(module)):
        variable.set_metadata(keeps_dtype=True)
    return module


def stack(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """Makes `count` modules as one whose every variable has a leading layer axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(layer_rngs: nnx.Rngs) -> M:
        return make(layer_rngs)

    layers = make(rngs) if _draws_nothing.get() else build(rngs)
    for _, variable in nnx.to_flat_state(nnx.state(layers)):
        variable.set_metadata(axes=(LAYERS, *variable.get_metadata()["axes"]))
        if _draws_nothing.get():
            value = variable.get_value()
            variable.set_value(jnp.zeros((count, *value.shape), value.dtype))
    return layers


RematPolicy = Literal["full", "dots", "none"]
_SAVED = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclass(frozen=True, kw_only=True)
class Remat:
    """What the backward pass computes again instead of keeping it, per part of a model."""

    llm: RematPolicy = "full"
    perception: RematPolicy = "full"


def scan_layers(
    layers: M,
    body: Callable[[M, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: RematPolicy = "full",
) -> tuple[Any, Any]:
    """Runs a stack: `carry, y = body(layer, carry, x)` for each layer; the ys come back stacked.

    `xs` is a pytree with a leading layer axis (caches, layer indices) or None. `remat` says what
    the backward pass computes again: `full` everything but the carries, `dots` all but products
    with weights, `none` nothing.
    """
    apart = (_apart.get() or {}).get(id(layers))
    if apart is not None:
        return apart.run(body, carry, xs)
    graphdef, state = nnx.split(layers)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        layer_state, x = inputs
        return body(nnx.merge(graphdef, _as_placed(layer_state), copy=True), carry, x)

    if remat != "none":
        step = jax.checkpoint(step, prevent_cse=False, policy=_SAVED[remat])
    return jax.lax.scan(step, carry, (state, xs))


@contextmanager
def read_in_place(network: Any) -> Iterator[None]:
    """Around a loop that runs a network's stacks again and again: their layers are read in place.

    XLA on CPUs copies the weights of every layer out of its stack whenever a scan comes to it: as
    much memory traffic as the whole of a step of one token. Here each layer gets arrays of its
    own before the loop, and the loop has a body per layer. That costs the stacks' size in memory,
    so not where they are larger than MOST_APART_BYTES, nor on other platforms, which read slices.
    """
    stacks = list(_stacks(network)) if platform() == "cpu" else []
    sizes = [x.size * x.dtype.itemsize for s in stacks for x in jax.tree.leaves(nnx.state(s))]
    if sum(sizes) > MOST_APART_BYTES:
        stacks = []
    apart = {id(stack): _Apart.of(stack) for stack in stacks}
    token = _apart.set({**(_apart.get() or {}), **apart})
    try:
        yield
    finally:
        _apart.reset(token)


def _stacks(module: Any) -> Iterator[nnx.Module]:
    """The stacks in a network; what is no module has none."""
    if not isinstance(module, nnx.Module):
        return
    variables = [variable for _, variable in nnx.to_flat_state(nnx.state(module))]
    if variables and all(v.get_metadata()["axes"][:1] == (LAYERS,) for v in variables):
        yield module
        return
    for value in vars(module).values():
        yield from _stacks(value)


class _Apart(NamedTuple):
    """A stack whose layers have arrays of their own."""

    graphdef: Any
    states: tuple[Any, ...]

    @classmethod
    def of(cls, layers: nnx.Module) -> "_Apart":
        graphdef, state = nnx.split(layers)
        count = len(jax.tree.leaves(state)[0])
        states = [_as_placed(jax.tree.map(lambda x, n=n: x[n], state)) for n in range(count)]
        return cls(graphdef, tuple(states))

    def run(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any
    ) -> tuple[Any, Any]:
        ys = []
        for number, state in enumerate(self.states):
            layer = nnx.merge(self.graphdef, state, copy=True)
            carry, y = body(layer, carry, jax.tree.map(lambda x, n=number: x[n], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *ys)


def _as_placed(layer_state: Any) -> Any:
    """One layer's variables, kept where the stack's are; so are their gradients, layer by layer.

    Left to itself XLA may sum whole gradients over all devices and cut them after the loop.
    """

    def pin(variable: Any) -> Any:
        value, axes = variable.get_value(), variable.get_metadata()["axes"]
        return variable.replace(constrain(value, *axes[1:]))

    return jax.tree.map(pin, layer_state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def split(module: nnx.Module) -> tuple[Any, Variables]:
    """Splits a module into a hashable definition and its variables by dotted path."""
    graphdef, state = nnx.split(module)
    flat = {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}
    return graphdef, flat


def merge(graphdef: Any, variables: Mapping[str, Any]) -> Any:
    """The inverse of `split`: a module over these variables (arrays or tracers)."""
    nested = unflatten_dict({tuple(_key(k) for k in p.split(".")): v for p, v in variables.items()})
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


def abstract(make: Callable[[], M]) -> M:
    """Builds a module whose variables are shapes and dtypes only: no memory, no device."""
    token = _draws_nothing.set(True)
    try:
        return nnx.eval_shape(make)
    finally:
        _draws_nothing.reset(token)


def draw(
    make: Callable[[], Variables], layout: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> Variables:
    """Computes initial values in one program, compiled quickly as it runs only once.

    With `layout` each is born with the dtype and the sharding of its leaf.
    """
    options = None
    if jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", ""):
        # on a CPU the last passes take most of the time and change no bit of the result
        options = {_LEVEL: 1}
    if layout is None:
        return dict(jax.jit(make, compiler_options=options)())

    def cast() -> Variables:
        return {path: value.astype(layout[path].dtype) for path, value in make().items()}

    placements = {path: layout[path].sharding for path in jax.eval_shape(make)}
    return dict(jax.jit(cast, out_shardings=placements, compiler_options=options)())


def _next_key(rngs: nnx.Rngs) -> jax.Array:
    """The key that `rngs.params()` gives, without its cost while tracing.

    There Flax asks the counter for its sharding, and JAX reads back everything traced so far to
    say that it has none: 14 s for a network of 300 variables, 0.6 s without.
    """
    stream = rngs.params
    key = jax.random.fold_in(stream.key[...], stream.count[...])
    stream.count.set_value(stream.count[...] + 1)
    return key


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part
