"""Repeated layers: stored stacked along a leading axis, run by `lax.scan` and `jax.checkpoint`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from speechlm2_jax.layers.module import LAYERS, SCANNED, AbstractRngs, constrain_layer
from speechlm2_jax.layers.unstacked import UnstackedLayers

C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)
Y = TypeVar("Y")
RematPolicy = Literal["full", "dots", "none"]
_SAVED = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def stack(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """Makes `count` equal modules as one, whose variables have a leading layer axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(layer_rngs: nnx.Rngs) -> M:
        return make(layer_rngs)

    is_abstract = isinstance(rngs, AbstractRngs)
    layers = make(rngs) if is_abstract else build(rngs)
    for _, variable in nnx.to_flat_state(nnx.state(layers)):
        variable.set_metadata(axes=(LAYERS, *variable.get_metadata()["axes"]))
        if is_abstract:
            value = variable.get_value()
            variable.set_value(jnp.zeros((count, *value.shape), value.dtype))
    setattr(layers, SCANNED, True)
    return layers


@dataclass(frozen=True, kw_only=True)
class Remat:
    """Rematerialisation policy of each component of a model (see `scan_layers`)."""

    llm: RematPolicy = "full"
    perception: RematPolicy = "full"


def scan_layers(
    layers: M | UnstackedLayers,
    body: Callable[[M, C, PyTree], tuple[C, Y]],
    carry: C,
    xs: PyTree = None,
    *,
    remat: RematPolicy = "full",
) -> tuple[C, Y]:
    """Scans over a stack: `carry, y = body(layer, carry, x)` per layer; returns the ys stacked.

    `xs` is a pytree with a leading layer axis (layer indices, for example) or None. `remat` is
    what the backward pass recomputes: `full` everything but the carries, `dots` everything but
    matmuls with weights, `none` nothing. `UnstackedLayers` run as a Python loop, without `remat`.
    """
    if isinstance(layers, UnstackedLayers):
        return layers.run(body, carry, xs)
    graphdef, state = nnx.split(layers)

    def run_layer(carry: C, inputs: tuple[PyTree, PyTree]) -> tuple[C, Y]:
        layer_state, x = inputs
        return body(nnx.merge(graphdef, constrain_layer(layer_state), copy=True), carry, x)

    if remat != "none":
        run_layer = jax.checkpoint(run_layer, prevent_cse=False, policy=_SAVED[remat])
    return jax.lax.scan(run_layer, carry, (state, xs))
