"""Position-wise feed-forward networks."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import default_init
from speechlm2_jax.layers.lora import LoraConfig, LoraLinear
from speechlm2_jax.layers.module import Initializer
from speechlm2_jax.sharding import constrain

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {"silu": jax.nn.silu}
)
"""Name in a checkpoint's config -> function."""


class GatedFeedForward(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        rngs: nnx.Rngs,
        activation: str = "silu",
        bias: bool = False,
        init: Initializer = default_init,
        lora: LoraConfig | None = None,
    ):
        def linear(name: str, d_in: int, d_out: int, axes: tuple[str, str]) -> LoraLinear:
            adapter = lora if lora is not None and name in lora.targets else None
            return LoraLinear(d_in, d_out, axes=axes, rngs=rngs, bias=bias, init=init, lora=adapter)

        self.activation = activation
        self.gate = linear("gate", width, hidden_width, ("mlp", "embed"))
        self.up = linear("up", width, hidden_width, ("mlp", "embed"))
        self.down = linear("down", hidden_width, width, ("embed", "mlp"))

    def __call__(
        self, x: Float[Array, "B T D"], rngs: Key[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Applies the network; with `rngs` the adapters' dropout is on."""
        x = constrain(x, "batch", "tokens", "act_embed")
        gate = constrain(self.gate(x, fold_rngs(rngs, 0)), "batch", "tokens", "act_mlp")
        up = constrain(self.up(x, fold_rngs(rngs, 1)), "batch", "tokens", "act_mlp")
        hidden = ACTIVATIONS[self.activation](gate) * up
        # first sum over the tensor-parallel devices, then shard the result along time
        out = constrain(self.down(hidden, fold_rngs(rngs, 2)), "batch", "tokens", "act_embed")
        return constrain(out, "batch", "time", "act_embed")
