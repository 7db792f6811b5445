"""The position-wise feed-forward network of a decoder layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from speechlm2_jax.layers.activations import ACTIVATIONS, XIELU, Xielu
from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import send_rows
from speechlm2_jax.layers.lora import LoraConfig, LoraLinear
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.sharding import constrain


class LlmFeedForward(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020), or, not gated, down(activation(up(x))).

    With `fused_gate_up` gate and up are one layer, `gate_up`, as in the checkpoint, so that one
    LoRA adapter serves both.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        def linear(name: str, d_in: int, d_out: int, axes: tuple[str, str]) -> LoraLinear:
            adapter = lora if lora is not None and name in lora.targets else None
            init = jax.nn.initializers.normal(config.init_std)
            bias = config.mlp_bias
            return LoraLinear(d_in, d_out, axes=axes, rngs=rngs, bias=bias, init=init, lora=adapter)

        def inner(name: str, d_out: int, *, is_there: bool) -> LoraLinear | None:
            return linear(name, config.width, d_out, ("mlp", "embed")) if is_there else None

        width, fused = config.mlp_width, config.fused_gate_up
        self.config = config
        self.gate_up = inner("gate_up", 2 * width, is_there=fused)
        self.gate = inner("gate", width, is_there=config.gated and not fused)
        self.up = inner("up", width, is_there=not fused)
        self.down = linear("down", width, config.width, ("embed", "mlp"))
        self.xielu = Xielu(rngs=rngs) if config.activation == XIELU else None

    def __call__(
        self, x: Float[Array, "B T D"], rngs: Key[Array, " B"] | None = None
    ) -> Float[Array, "B T D"]:
        """Applies the network; with `rngs` the adapters' dropout is on."""
        x = constrain(x, "batch", "tokens", "act_embed")
        hidden = self._hidden(send_rows(x, self.gate_up, self.up), rngs)
        # first sum over the tensor-parallel devices, then shard the result along time
        out = constrain(self.down(hidden, fold_rngs(rngs, 2)), "batch", "tokens", "act_embed")
        return constrain(out, "batch", "time", "act_embed")

    def _hidden(
        self, x: Float[Array, "B T D"], rngs: Key[Array, " B"] | None
    ) -> Float[Array, "B T W"]:
        activation = self.xielu or ACTIVATIONS[self.config.activation]
        if self.gate_up is not None:
            gate, up = jnp.split(self.gate_up(x, fold_rngs(rngs, 0)), 2, axis=-1)
            gate, up = (constrain(half, "batch", "tokens", "act_mlp") for half in (gate, up))
            return activation(gate) * up
        assert self.up is not None
        if self.gate is None:
            up = self.up(x, fold_rngs(rngs, 1))
            return activation(constrain(up, "batch", "tokens", "act_mlp"))
        gate = constrain(self.gate(x, fold_rngs(rngs, 0)), "batch", "tokens", "act_mlp")
        up = constrain(self.up(x, fold_rngs(rngs, 1)), "batch", "tokens", "act_mlp")
        return activation(gate) * up
