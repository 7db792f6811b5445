"""Connectionist temporal classification (Graves et al. 2006) over a FastConformer encoder.

The last class is the blank, as in NeMo: a tokenizer of `V` pieces gives `V + 1` classes.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.stack import RematPolicy
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.log_mel import LogMelConfig
from speechlm2_jax.perception.perception import AudioPerception, PerceptionConfig
from speechlm2_jax.perception.spec_augment import SpecAugmentConfig

_IMPOSSIBLE = 1e4
"""Losses above it are infinite: too few frames for the labels (optax uses 1e5 for infinity)."""


@dataclass(frozen=True, kw_only=True)
class CtcConfig:
    """Architecture of a CTC model."""

    preprocessor: LogMelConfig
    encoder: FastConformerConfig
    vocab_size: int
    """Pieces of the tokenizer, without the blank."""
    spec_augment: SpecAugmentConfig | None = None
    compute_dtype: str = "float32"
    remat: RematPolicy = "full"

    @property
    def perception(self) -> PerceptionConfig:
        """Front end and encoder, as in a speech LLM but without adapter and projection."""
        return PerceptionConfig.of_encoder(self.preprocessor, self.encoder, self.spec_augment)


class CtcNetwork(AudioPerception):
    """Log-mel, encoder and a linear head: audio [B, S] -> frames [B, T, D] -> logits [B, T, C]."""

    def __init__(self, config: CtcConfig, *, rngs: nnx.Rngs):
        super().__init__(config.perception, rngs=rngs)
        self.ctc = config
        width, classes = config.encoder.width, config.vocab_size + 1
        self.head = Linear(width, classes, axes=(None, "embed"), rngs=rngs)

    def logits(self, frames: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        """Computes the logits of every frame in fp32."""
        return self.head(frames).astype(jnp.float32)


def ctc_loss(
    logits: Float[Array, "B T C"],
    frame_lengths: Int[Array, " B"],
    labels: Int[Array, "B U"],
    label_lengths: Int[Array, " B"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Computes the loss of each sequence in nats, and 1.0 where it counts (else 0.0).

    Sequences without labels, or with too few frames for their labels (NeMo's `zero_infinity`),
    have loss 0 and do not count.
    """
    frame_padding = jnp.arange(logits.shape[1])[None] >= frame_lengths[:, None]
    label_padding = jnp.arange(labels.shape[1])[None] >= label_lengths[:, None]
    losses = optax.ctc_loss(
        logits.astype(jnp.float32),
        frame_padding.astype(jnp.float32),
        labels,
        label_padding.astype(jnp.float32),
        blank_id=logits.shape[-1] - 1,
    )
    counts = (label_lengths > 0) & (losses < _IMPOSSIBLE)
    return jnp.where(counts, losses, 0.0), counts.astype(jnp.float32)


def best_path(logits: Float[Array, "B T C"], frame_lengths: Int[Array, " B"]) -> Int[Array, "B T"]:
    """Returns the best class of each frame; blank at padding."""
    classes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_frame = jnp.arange(classes.shape[1])[None] < frame_lengths[:, None]
    return jnp.where(is_frame, classes, logits.shape[-1] - 1)


def collapse(path: np.ndarray, blank: int) -> list[int]:
    """Decodes a path [T] into labels: merges repeats, then drops blanks."""
    path = np.asarray(path)
    starts = np.concatenate([[True], path[1:] != path[:-1]]) if len(path) else np.zeros(0, bool)
    return [int(label) for label in path[starts & (path != blank)]]


def pack_labels(
    targets: Int[Array, "R T"], scored: Array
) -> tuple[Int[Array, "R T"], Int[Array, " R"]]:
    """Moves the scored targets of each sequence to its front, in order; also counts them."""
    order = jnp.argsort(~scored, axis=-1, stable=True)
    return jnp.take_along_axis(targets, order, axis=-1), jnp.sum(scored, axis=-1, dtype=jnp.int32)


def clip_indices(index: Int[Array, "R T"], frames_per_clip: int) -> Int[Array, " R"]:
    """Returns the clip of each sequence, -1 for none.

    `index` maps each token to a frame among all clips of the data-parallel shard, -1 for text.
    """
    return (jnp.max(index, axis=-1) + frames_per_clip) // frames_per_clip - 1
