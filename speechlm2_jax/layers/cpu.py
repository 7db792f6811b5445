"""Code that exists only because XLA is slow at something on CPUs, each piece with its measurement.

Everywhere else the plain form is used. The measurements are in docs/performance.md. One more is in
`codec/convolutions.py` (convolutions of few channels), beside the convolution that it replaces.
"""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.layers.module import LAYERS, SCANNED, constrain_layer
from speechlm2_jax.sharding import platform

FEW_ROWS = 32
"""Up to this many rows of the input, a matmul on a CPU takes the time to read the weight."""
LOSS_CHUNKS = 4
"""Chunks of the loss on a CPU where one chunk would hold all scored positions."""
MAX_UNSTACKED_BYTES = 6 * 2**30
"""Largest stacks that `read_in_place` copies: 1.1 B parameters in fp32, or 3 B in bf16."""
_LEVEL = "xla_backend_optimization_level"
N = TypeVar("N")


def fast_compile_options() -> dict[str, int] | None:
    """Compiler options for a program that runs once (initial values); None for the defaults.

    On a CPU the last XLA passes take most of the compile time. They change no bit of the result.
    """
    if jax.default_backend() == "cpu" and _LEVEL not in os.environ.get("XLA_FLAGS", ""):
        return {_LEVEL: 1}
    return None


def is_slow_matmul(rows: int) -> bool:
    """True if x Wᵀ with `rows` rows of x is faster as `weight_first_matmul`: 2 to 32, on a CPU."""
    return platform() == "cpu" and 1 < rows <= FEW_ROWS


def weight_first_matmul(
    x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"], **options: Any
) -> Float[Array, "*batch d_out"]:
    """Computes x Wᵀ as (W xᵀ)ᵀ; `options` are those of einsum.

    XLA reads a weight on the left of a matmul at 8 to 13 GB/s and one on the right at 4 to 8.
    """
    rows = math.prod(x.shape[:-1])
    columns = jnp.einsum("od,rd->or", weight, x.reshape(rows, -1), **options)
    # without the barrier XLA swaps the operands back
    return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)


def loss_chunk(positions: int) -> int:
    """Positions of a loss chunk, where one chunk could hold all: a quarter of them on a CPU.

    Chunks without a target are skipped: the head of a training step of batch 4 took 50 ms instead
    of 167 ms, of 2,150 ms in all.
    """
    return -(-positions // LOSS_CHUNKS) if platform() == "cpu" else positions


def read_in_place(network: N) -> N:
    """A copy of a network for a decoding loop: `scan_layers` over its stacks is unrolled.

    XLA on CPUs copies each layer's weights out of the stack at every iteration of a scan: as much
    memory traffic as a decoding step of one token itself. Here each layer's weights are copied
    once, before the loop. That needs as much memory as the stacks take, so stacks above
    `MAX_UNSTACKED_BYTES` in total are left alone. GPUs and TPUs read slices of a stack in place.
    """
    stacks = list(_stacks(network)) if platform() == "cpu" else []
    sizes = [x.size * x.dtype.itemsize for s in stacks for x in jax.tree.leaves(nnx.state(s))]
    if not stacks or sum(sizes) > MAX_UNSTACKED_BYTES:
        return network
    graphdef, state = nnx.split(network)
    return _unstacked(nnx.merge(graphdef, state, copy=True))


class UnstackedLayers(NamedTuple):
    """The layers of a stack, each with arrays of its own."""

    graphdef: Any
    states: tuple[Any, ...]

    @classmethod
    def of(cls, stack: nnx.Module) -> "UnstackedLayers":
        """Slices every variable of a stack along its layer axis."""
        graphdef, state = nnx.split(stack)
        count = len(jax.tree.leaves(state)[0])
        states = [constrain_layer(jax.tree.map(lambda x, n=n: x[n], state)) for n in range(count)]
        return cls(graphdef, tuple(states))

    def run(
        self, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, xs: Any
    ) -> tuple[Any, Any]:
        """Computes what `scan_layers` computes, as a Python loop."""
        ys = []
        for index, state in enumerate(self.states):
            layer = nnx.merge(self.graphdef, state, copy=True)
            carry, y = body(layer, carry, jax.tree.map(lambda x, i=index: x[i], xs))
            ys.append(y)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *ys)


def _unstacked(module: N) -> N:
    """Replaces the stacks in a module, at any depth, by their layers; changes `module`."""
    for name, value in list(vars(module).items()):
        if _is_stack(value):
            vars(module)[name] = UnstackedLayers.of(value)  # what NNX must not split or merge
        elif _has_more_than_stacks(value):
            _unstacked(value)
    return module


def _stacks(module: object) -> Iterator[nnx.Module]:
    """Yields the stacks in a network, at any depth."""
    for value in vars(module).values():
        if _is_stack(value):
            yield value
        elif _has_more_than_stacks(value):
            yield from _stacks(value)


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
