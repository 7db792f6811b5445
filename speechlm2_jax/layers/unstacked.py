"""Stacks of layers taken apart, so that a decoding loop on a CPU reads the weights in place.

XLA on CPUs copies each layer's weights out of the stack at every iteration of a scan: as much
memory traffic as a decoding step of one token itself. GPUs and TPUs read slices of a stack in
place, and scan. The measurements are in docs/performance.md.

- `LayerViews` gives the arrays of each layer to the program. They share the memory of the stack.
- `read_in_place` takes the stacks apart inside a program that has only them. That copies each
  layer once, before the loop.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.layers.module import LAYERS, MAY_BE_WORDS, SCANNED, constrain_layer, merge
from speechlm2_jax.layers.words import BFLOAT16, words_of
from speechlm2_jax.sharding import platform

MAX_UNSTACKED_BYTES = 6 * 2**30
"""Largest stacks that `read_in_place` copies: 1.1 B parameters in fp32, or 3 B in bf16."""
C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)
N = TypeVar("N")
Y = TypeVar("Y")
Unlayered = Mapping[str, AnyArray | jax.ShapeDtypeStruct]
"""Variables with stacks as they are."""
Layered = Mapping[str, AnyArray | jax.ShapeDtypeStruct | tuple[AnyArray, ...]]
"""Variables of which some have an array of each layer in place of the stacked one."""


class LayerViews:
    """The variables of a network as inference programs on one CPU read them, without copies.

    bf16 weights of matmuls become words (`layers/words.py`). `root` is the path of the part whose
    stacks a decoding loop reads ("llm."). Results are kept until the variables change. Variables
    that are not on one CPU are returned as they are.
    """

    def __init__(self, root: str):
        self._root = root
        self._of: Unlayered = {}
        self._words: dict[str, AnyArray] = {}
        self._views: dict[str, tuple[AnyArray, ...]] = {}

    def __call__(self, graphdef: nnx.GraphDef, variables: Unlayered) -> Layered:
        """Returns variables for `merge_layers`, with arrays of each layer in place of some stacks.

        A stacked array [L, ...] becomes a tuple of L arrays that share its memory.
        """
        self._refresh(graphdef, variables)
        changed = {**self._words, **self._views}
        return {**variables, **changed} if changed else variables

    def whole(self, graphdef: nnx.GraphDef, variables: Unlayered) -> Unlayered:
        """Returns variables for `merge`: the stacks stay whole."""
        self._refresh(graphdef, variables)
        return {**variables, **self._words} if self._words else variables

    def _refresh(self, graphdef: nnx.GraphDef, variables: Unlayered) -> None:
        is_same = variables.keys() == self._of.keys()
        if is_same and all(variables[path] is x for path, x in self._of.items()):
            return
        self._of, self._words, self._views = dict(variables), {}, {}
        local = {path for path, x in variables.items() if _is_on_one_cpu(x)}
        if not local:
            return
        shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in variables.items()}
        network = merge(graphdef, shapes)
        narrow = {path for path in local if variables[path].dtype == BFLOAT16}
        self._words = {p: words_of(variables[p]) for p in narrow & set(_readable_as_words(network))}
        own = {path for path in variables if path.startswith(self._root)}
        if own <= local:
            given = {**variables, **self._words}
            self._views = {p: _views(given[p]) for p in own & set(_stacked_paths(network))}


def merge_layers(graphdef: nnx.GraphDef, variables: Layered) -> Any:
    """`merge` for the variables that `LayerViews` returns; loops over those layers are unrolled."""
    layers = {path: value for path, value in variables.items() if isinstance(value, tuple)}
    one_each = {p: v[0] if isinstance(v, tuple) else v for p, v in variables.items()}
    network = merge(graphdef, one_each)
    if not layers:
        return network
    return _replaced(network, lambda stack, path: UnstackedLayers.of_views(stack, path, layers))


def read_in_place(network: N) -> N:
    """A copy of a network for a decoding loop: `scan_layers` over its stacks is unrolled.

    The layers are copied out of their stacks once, which needs as much memory as the stacks take.
    So stacks above `MAX_UNSTACKED_BYTES` in total are left alone. A network that has its layers
    from `LayerViews` is returned as it is.
    """
    stacks = [stack for _, stack in _stacks(network)] if platform() == "cpu" else []
    sizes = [x.size * x.dtype.itemsize for s in stacks for x in jax.tree.leaves(nnx.state(s))]
    if not stacks or sum(sizes) > MAX_UNSTACKED_BYTES:
        return network
    graphdef, state = nnx.split(network)
    copy = nnx.merge(graphdef, state, copy=True)
    return _replaced(copy, lambda stack, path: UnstackedLayers.of(stack))


class UnstackedLayers(NamedTuple):
    """The layers of a stack, each with arrays of its own."""

    graphdef: nnx.GraphDef
    states: tuple[PyTree, ...]

    @classmethod
    def of(cls, stack: nnx.Module) -> "UnstackedLayers":
        """Slices every variable of a stack along its layer axis."""
        graphdef, state = nnx.split(stack)
        count = len(jax.tree.leaves(state)[0])
        states = [constrain_layer(jax.tree.map(lambda x, n=n: x[n], state)) for n in range(count)]
        return cls(graphdef, tuple(states))

    @classmethod
    def of_views(
        cls, stack: nnx.Module, root: str, layers: Mapping[str, tuple[AnyArray, ...]]
    ) -> "UnstackedLayers | nnx.Module":
        """Takes the arrays of each layer from `layers`; the stack itself if they are not there."""
        graphdef, state = nnx.split(stack)
        flat = nnx.to_flat_state(state)
        paths = [".".join(map(str, (root, *path))) for path, _ in flat]
        if not layers.keys() >= set(paths):
            return stack
        by_layer = zip(*(layers[path] for path in paths), strict=True)
        return cls(graphdef, tuple(_with_values(flat, values) for values in by_layer))

    def run(self, body: Callable[[M, C, PyTree], tuple[C, Y]], carry: C, xs: PyTree) -> tuple[C, Y]:
        """Computes what `scan_layers` computes, as a Python loop."""
        ys = []
        for index, state in enumerate(self.states):
            layer = nnx.merge(self.graphdef, state, copy=True)
            carry, y = body(layer, carry, jax.tree.map(lambda x, i=index: x[i], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *ys)


def _is_on_one_cpu(value: object) -> bool:
    if isinstance(value, Tracer) or not isinstance(value, jax.Array):
        return False
    return len(value.devices()) == 1 and next(iter(value.devices())).platform == "cpu"


def _views(stacked: AnyArray | jax.ShapeDtypeStruct) -> tuple[AnyArray, ...]:
    """The layers of an array [L, ...]; JAX takes an aligned array of the host without a copy."""
    assert isinstance(stacked, jax.Array)
    device = next(iter(stacked.devices()))
    return tuple(jax.device_put(layer, device) for layer in np.asarray(stacked))


def _with_values(flat: Any, values: tuple[AnyArray, ...]) -> Any:
    pairs = zip(flat, values, strict=True)
    return nnx.from_flat_state(
        [(path, variable.replace(value)) for (path, variable), value in pairs]
    )


def _replaced(module: N, change: Callable[[nnx.Module, str], Any], root: str = "") -> N:
    """Replaces the stacks in a module, at any depth; changes `module`."""
    for name, value in list(vars(module).items()):
        if _is_stack(value):
            vars(module)[name] = change(value, root + name)  # what NNX must not split or merge
        elif _has_more_than_stacks(value):
            _replaced(value, change, f"{root}{name}.")
    return module


def _stacks(module: object, root: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """Yields (path, stack) of the stacks in a network, at any depth."""
    for name, value in vars(module).items():
        if _is_stack(value):
            yield root + name, value
        elif _has_more_than_stacks(value):
            yield from _stacks(value, f"{root}{name}.")


def _stacked_paths(network: nnx.Module) -> Iterator[str]:
    for root, stack in _stacks(network):
        for path, _ in nnx.to_flat_state(nnx.state(stack)):
            yield ".".join(map(str, (root, *path)))


def _readable_as_words(network: nnx.Module) -> Iterator[str]:
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        if variable.get_metadata().get(MAY_BE_WORDS):
            yield ".".join(map(str, path))


def _is_stack(value: object) -> TypeGuard[nnx.Module]:
    if isinstance(value, nnx.List):
        return len(value) > 0 and all(_is_stack(each) for each in value)
    return isinstance(value, nnx.Module) and getattr(value, SCANNED, False)


def _has_more_than_stacks(value: object) -> TypeGuard[nnx.Module]:
    """Whether a module has variables outside of stacks; the speech decoder's transformer has none.

    Its scan is left as it is: it was never measured unrolled.
    """
    if not isinstance(value, nnx.Module):
        return False
    variables = [variable for _, variable in nnx.to_flat_state(nnx.state(value))]
    return any(v.get_metadata()["axes"][:1] != (LAYERS,) for v in variables)
