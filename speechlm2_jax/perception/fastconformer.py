"""FastConformer (Rekesh et al. 2023): subsampling, then Conformer layers over frames."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.dropout import dropout, fold_rngs
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.stack import RematPolicy, scan_layers, stack
from speechlm2_jax.perception.batch_norm import Statistics
from speechlm2_jax.perception.conformer_layer import ConformerLayer, LayerInputs
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frame_mask import FrameMask, sinusoids
from speechlm2_jax.perception.frames import is_within
from speechlm2_jax.perception.self_attention import (
    padded_queries,
    position_bias,
    relative_positions,
)
from speechlm2_jax.perception.subsampling import make_subsampling
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain

_LAYERS_RNG, _INPUT_RNG, _NEAR_RNG, _FAR_RNG, _CONTEXT_RNG = range(5)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """Output of an encoder or a modality adapter."""

    frames: Float[Array, "B T D"]
    lengths: Int[Array, " B"]
    statistics: Statistics
    """New batch-norm statistics by variable path; empty in evaluation."""
    extents: Int[Array, " B"] | None = None
    """The `extents` argument converted to output frames."""
    layers: Float[Array, "L B T W"] | None = None
    """Output of every layer, with `return_layers`."""
    captured: Float[Array, "B K T D"] | None = None
    """Outputs of the K layers of `capture`, projected like `frames`."""


class FastConformer(nnx.Module):
    """Features [B, T, feat_in] -> frames [B, T / factor, width]. As NeMo's ConformerEncoder."""

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.subsampling = make_subsampling(config, rngs=rngs)
        self.layers = stack(lambda r: ConformerLayer(config, rngs=r), config.n_layers, rngs)
        tied = config.is_relative and not config.untie_biases
        self.position_bias_u = position_bias(config, rngs) if tied else None
        self.position_bias_v = position_bias(config, rngs) if tied else None
        self.output = (
            Linear(config.d_model, config.width, axes=(None, "embed"), rngs=rngs)
            if config.width != config.d_model
            else None
        )

    def __call__(
        self,
        features: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        *,
        train: bool = False,
        rngs: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
        return_layers: bool = False,
        capture: tuple[int, ...] = (),
        remat: RematPolicy = "full",
    ) -> EncoderOutput:
        """Encodes clips of `lengths` real frames; a clip of length 0 is padding.

        `train`: batch norm uses the statistics of this batch, over the real frames or, if given,
        over the first `extents` input frames of each clip. `rngs` (one key per clip, training only)
        turn dropout on and draw one attention context per clip. `capture` lists the layers whose
        outputs are returned too.
        """
        config = self.config
        x, lengths, extents = self._embed(features, lengths, extents, rngs)
        length = x.shape[1]
        inputs = LayerInputs(
            frame_mask=self._frame_mask(length, lengths, rngs),
            present=is_within(lengths if extents is None else extents, length),
            train=train,
            tied_biases=self.tied_biases(),
        )
        layer_rngs = fold_rngs(rngs, _LAYERS_RNG)

        def body(layer: ConformerLayer, carry: tuple, index: Array) -> tuple[tuple, tuple]:
            x, captured = carry
            x, statistics = layer(x, inputs, fold_rngs(layer_rngs, index))
            x = constrain(x, "clips", "frames", "act_embed")
            captured = tuple(
                jnp.where(index == n, x, k) for n, k in zip(capture, captured, strict=True)
            )
            return (x, captured), (statistics, x if return_layers else None)

        indices = jnp.arange(config.n_layers)
        start = (x, (jnp.zeros_like(x),) * len(capture))
        (x, captured), (statistics, layers) = scan_layers(
            self.layers, body, start, indices, remat=remat
        )
        return EncoderOutput(
            frames=self.project(x),
            lengths=lengths,
            statistics={f"layers.{path}": value for path, value in statistics.items()},
            extents=extents,
            layers=layers,
            captured=self.project(jnp.stack(captured, axis=1)) if capture else None,
        )

    def _embed(
        self,
        features: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        extents: Int[Array, " B"] | None,
        rngs: Key[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T2 D2"], Int[Array, " B"], Int[Array, " B"] | None]:
        """Subsamples; returns the first layer's input, and lengths and extents in its frames."""
        config = self.config
        subsampled = self.subsampling(features, lengths, extents)
        lengths = jnp.where(lengths > 0, subsampled.lengths, 0)
        if extents is not None:
            extents = jnp.where(extents > 0, config.subsampled(extents), 0)
        x = self.add_positions(subsampled.frames, jnp.arange(subsampled.frames.shape[1])[None])
        x = dropout(x, config.dropout_pre_encoder, fold_rngs(rngs, _INPUT_RNG))
        return constrain(x, "clips", "frames", "act_embed"), lengths, extents

    def add_positions(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B1 T"]
    ) -> Float[Array, "B T D"]:
        """Scales subsampled frames; with abs_pos, adds the sinusoids of their positions."""
        config = self.config
        x = x * (math.sqrt(config.d_model) if config.xscaling else 1.0)
        if config.is_relative:
            return x
        table = sinusoids(positions.astype(jnp.float32), config.d_model)
        return x + jnp.broadcast_to(table.astype(x.dtype), x.shape)

    def project(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T W"]:
        """Projects a layer's output to the width of the output frames."""
        return x if self.output is None else self.output(x)

    def tied_biases(self) -> tuple[Array, Array] | None:
        """Returns the position biases (u, v) if all layers share them (`untie_biases: false`)."""
        if self.position_bias_u is None or self.position_bias_v is None:
            return None
        return self.position_bias_u[...], self.position_bias_v[...]

    def _frame_mask(
        self, length: int, lengths: Int[Array, " B"], rngs: Key[Array, " B"] | None
    ) -> FrameMask:
        """Makes the mask: the first attention context or, given `rngs`, one drawn per clip."""
        config = self.config
        contexts = jnp.asarray(config.contexts)
        chosen = jnp.zeros(lengths.shape, jnp.int32)
        if rngs is not None and len(config.contexts) > 1:
            cumulative = jnp.cumsum(jnp.asarray(config.context_probabilities))[:-1]
            context_rngs = jax.vmap(lambda k: jax.random.fold_in(k, _CONTEXT_RNG))(rngs)
            draws = jax.vmap(jax.random.uniform)(context_rngs)
            chosen = jnp.sum(draws[:, None] >= cumulative[None], axis=1)
        left, right = jnp.take(contexts, chosen, axis=0).T
        positions = None
        if config.is_relative:
            positions = self._drop_positions(
                relative_positions(length, config.d_model), length, rngs
            )
        return FrameMask(positions=positions, lengths=lengths, left=left, right=right)

    def _drop_positions(
        self, table: Float[Array, "P D"], length: int, rngs: Key[Array, " B"] | None
    ) -> Float[Array, "*B P D"]:
        """Drops entries of the position table.

        Drawn from distance 0 outwards, so that the padded length changes no draw.
        """
        rate = self.config.dropout_emb
        if rngs is None or rate == 0.0:
            return table
        split = padded_queries(length)
        table = jnp.broadcast_to(table[None], (rngs.shape[0], *table.shape))
        near = dropout(table[:, split - 1 :: -1], rate, fold_rngs(rngs, _NEAR_RNG))
        far = dropout(table[:, split:], rate, fold_rngs(rngs, _FAR_RNG))
        return jnp.concatenate([near[:, ::-1], far], axis=1)
