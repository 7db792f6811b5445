"""FastConformer (Rekesh et al. 2023): subsampling, then Conformer layers over frames."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.dropout import dropout, fold_keys
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.module import RematPolicy, scan_layers, stack
from speechlm2_jax.perception.batch_norm import Statistics
from speechlm2_jax.perception.conformer_layer import ConformerLayer, LayerInputs
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frames import is_within
from speechlm2_jax.perception.relative_attention import (
    View,
    padded_queries,
    position_bias,
    relative_positions,
)
from speechlm2_jax.perception.subsampling import Subsampling
from speechlm2_jax.sharding import constrain

_LAYERS_PLACE, _INPUT_PLACE, _NEAR_PLACE, _FAR_PLACE, _CONTEXT_PLACE = range(5)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """What an encoder or a modality adapter gives."""

    frames: Float[Array, "B T D"]
    lengths: Int[Array, " B"]
    statistics: Statistics
    """New batch-norm statistics by path; empty in evaluation."""
    extents: Int[Array, " B"] | None = None
    """The given extents, in output frames."""
    layers: Float[Array, "L B T W"] | None = None
    """Every layer's output, if asked for."""


class FastConformer(nnx.Module):
    """Features [B, T, feat_in] -> frames [B, T / factor, width]. The definition is NeMo's."""

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.subsampling = Subsampling(config, rngs=rngs)
        self.layers = stack(lambda r: ConformerLayer(config, rngs=r), config.n_layers, rngs)
        tied = not config.untie_biases
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
        keys: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
        return_layers: bool = False,
        remat: RematPolicy = "full",
    ) -> EncoderOutput:
        """Encodes rows of `lengths` real frames; rows of length 0 are empty.

        `train` lets batch norm use the statistics of this batch: of its real frames, or, if given,
        of the first `extents` input frames of each row. `keys`, one per row, switch dropout on
        and draw the attention context where there are several; use them in training only.
        """
        config = self.config
        subsampled = self.subsampling(features, lengths)
        lengths = jnp.where(lengths > 0, subsampled.lengths, 0)
        if extents is not None:
            extents = jnp.where(extents > 0, config.subsampled(extents), 0)
        x = subsampled.frames * (math.sqrt(config.d_model) if config.xscaling else 1.0)
        x = dropout(x, config.dropout_pre_encoder, fold_keys(keys, _INPUT_PLACE))
        x = constrain(x, "clips", "frames", "act_embed")
        counted = is_within(lengths if extents is None else extents, x.shape[1]) if train else None
        inputs = LayerInputs(
            view=self._view(x.shape[1], lengths, keys),
            counted=counted,
            tied_biases=self._tied_biases(),
        )
        layer_keys = fold_keys(keys, _LAYERS_PLACE)

        def body(layer: ConformerLayer, x: Array, index: Array) -> tuple[Array, tuple]:
            x, statistics = layer(x, inputs, fold_keys(layer_keys, index))
            x = constrain(x, "clips", "frames", "act_embed")
            return x, (statistics, x if return_layers else None)

        indices = jnp.arange(config.n_layers)
        x, (statistics, layers) = scan_layers(self.layers, body, x, indices, remat=remat)
        return EncoderOutput(
            frames=x if self.output is None else self.output(x),
            lengths=lengths,
            statistics={f"layers.{path}": value for path, value in statistics.items()},
            extents=extents,
            layers=layers,
        )

    def _tied_biases(self) -> tuple[Array, Array] | None:
        if self.position_bias_u is None or self.position_bias_v is None:
            return None
        return self.position_bias_u[...], self.position_bias_v[...]

    def _view(self, steps: int, lengths: Int[Array, " B"], keys: Key[Array, " B"] | None) -> View:
        """What the frames may see: the first context, or with keys one drawn per row."""
        config = self.config
        contexts = jnp.asarray(config.contexts)
        chosen = jnp.zeros(lengths.shape, jnp.int32)
        if keys is not None and len(config.contexts) > 1:
            cumulative = jnp.cumsum(jnp.asarray(config.context_probabilities))[:-1]
            context_keys = jax.vmap(lambda k: jax.random.fold_in(k, _CONTEXT_PLACE))(keys)
            draws = jax.vmap(jax.random.uniform)(context_keys)
            chosen = jnp.sum(draws[:, None] >= cumulative[None], axis=1)
        left, right = jnp.take(contexts, chosen, axis=0).T
        positions = self._drop_positions(relative_positions(steps, config.d_model), steps, keys)
        return View(positions=positions, lengths=lengths, left=left, right=right)

    def _drop_positions(
        self, table: Float[Array, "P D"], steps: int, keys: Key[Array, " B"] | None
    ) -> Float[Array, "*B P D"]:
        """Dropout of the table, drawn by distance from 0 outwards, whatever the length."""
        rate = self.config.dropout_emb
        if keys is None or rate == 0.0:
            return table
        split = padded_queries(steps)
        table = jnp.broadcast_to(table[None], (keys.shape[0], *table.shape))
        near = dropout(table[:, split - 1 :: -1], rate, fold_keys(keys, _NEAR_PLACE))
        far = dropout(table[:, split:], rate, fold_keys(keys, _FAR_PLACE))
        return jnp.concatenate([near[:, ::-1], far], axis=1)
