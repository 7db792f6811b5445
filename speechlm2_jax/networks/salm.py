"""SALM: speech and text in one sequence for an LLM (arXiv 2310.09424; NeMo SpeechLM2 SALM).

Three stages, each a pure function and a parity point:
`prepare` (audio and ids -> input embeddings), `forward` (embeddings -> hidden states) and
`losses` (hidden states -> sums).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.batches import SalmBatch, StepLosses
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.stack import Remat
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.networks.interleave import interleave
from speechlm2_jax.networks.losses import chunked_cross_entropy
from speechlm2_jax.perception.perception import (
    AudioPerception,
    PerceptionConfig,
    PerceptionModes,
)
from speechlm2_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class SalmConfig:
    """Architecture of a SALM; nothing here comes from data or training."""

    llm: DecoderConfig
    perception: PerceptionConfig
    lora: LoraConfig | None = None
    compute_dtype: str = "float32"
    """Dtype of activations; norms, softmax, mel and losses stay in fp32."""
    remat: Remat = Remat()

    def __post_init__(self) -> None:
        self.perception.check_width(self.llm.width)


@dataclass(frozen=True, kw_only=True)
class SalmModes:
    """Which parts are in training mode; a frozen part stays in evaluation mode, as in NeMo."""

    perception: PerceptionModes = PerceptionModes()
    llm: bool = False


@dataclass(frozen=True, kw_only=True)
class SalmInputs:
    """What the LLM sees: [B, T, D] with B = groups x rows, and new batch-norm statistics."""

    embeds: Float[Array, "B T D"]
    statistics: dict[str, Array]


class Salm(nnx.Module):
    """FastConformer -> modality adapter -> projection, beside a decoder LLM."""

    def __init__(self, config: SalmConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.perception = AudioPerception(config.perception, rngs=rngs)
        self.llm = Decoder(config.llm, rngs=rngs, lora=config.lora)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.config.compute_dtype)


def example_rngs(key: Key[Array, ""] | None, ids: Int[Array, "G N"]) -> Key[Array, " B"] | None:
    """One key per example from its position in the global batch, whatever its neighbours."""
    if key is None:
        return None
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids.reshape(-1))


def encode_audio(
    network: Salm, batch: SalmBatch, modes: SalmModes, key: Key[Array, ""] | None
) -> tuple[Float[Array, "G C F D"], dict[str, Array]]:
    """Encodes every clip of every group into LLM-width frames; clips share no encoder row."""
    groups, clips, samples = batch.audio.shape
    output = network.perception(
        constrain(batch.audio.reshape(groups * clips, samples), "clips", None),
        batch.audio_lengths.reshape(-1),
        modes=modes.perception,
        rngs=example_rngs(key, batch.clip_ids),
        extents=jnp.repeat(batch.audio_extent, clips),
        dtype=network.dtype,
        remat=network.config.remat.perception,
    )
    frames = output.frames.reshape(groups, clips, *output.frames.shape[1:])
    return frames, output.statistics


def prepare(
    network: Salm, batch: SalmBatch, modes: SalmModes, key: Key[Array, ""] | None = None
) -> SalmInputs:
    """Embeds text, encodes audio, and interleaves them. Without `key` nothing is random."""
    if batch.audio.shape[1] == 0:
        return join(network, batch, None, {})
    return join(network, batch, *encode_audio(network, batch, modes, key))


def join(
    network: Salm,
    batch: SalmBatch,
    frames: Float[Array, "G C F D"] | None,
    statistics: dict[str, Array],
) -> SalmInputs:
    """Embeds the text of a batch and puts the frames of its clips between; None: there are none."""
    text = network.llm.embed(batch.tokens).astype(network.dtype)
    if frames is not None:
        text = interleave(text, frames.astype(network.dtype), batch.audio_index)
    embeds = text.reshape(-1, *text.shape[2:])
    return SalmInputs(
        embeds=constrain(embeds, "batch", "time", "act_embed"),
        statistics={f"perception.{path}": value for path, value in statistics.items()},
    )


def forward(
    network: Salm,
    embeds: Float[Array, "B T D"],
    batch: SalmBatch,
    modes: SalmModes,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """Runs the LLM over interleaved embeddings; hidden states after the final norm."""
    rows = embeds.shape[:2]
    return network.llm(
        embeds,
        positions=batch.positions.reshape(rows),
        segments=batch.segments.reshape(rows),
        attention_mask=batch.attention_mask.reshape(rows),
        rngs=example_rngs(key, batch.sequence_ids) if modes.llm else None,
        remat=network.config.remat.llm,
    )


def losses(
    network: Salm, batch: SalmBatch, modes: SalmModes, key: Key[Array, ""] | None = None
) -> StepLosses:
    """Next-token cross-entropy over the assistant's turns, and token accuracy (`acc`), as sums."""
    audio_key, text_key = (None, None) if key is None else jax.random.split(key)
    return score(network, prepare(network, batch, modes, audio_key), batch, modes, text_key)


def score(
    network: Salm,
    inputs: SalmInputs,
    batch: SalmBatch,
    modes: SalmModes,
    key: Key[Array, ""] | None = None,
) -> StepLosses:
    """Runs the LLM over prepared inputs and sums the losses of what is scored."""
    hidden = forward(network, inputs.embeds, batch, modes, key)
    rows = hidden.shape[:2]
    mask: Bool[Array, "B T"] = batch.loss_mask.reshape(rows)
    loss, accuracy = chunked_cross_entropy(
        hidden,
        batch.targets.reshape(rows),
        mask,
        network.llm.logits,
        rows_per_chunk=batch.tokens.shape[1],
    )
    return StepLosses(loss=loss, metrics={"acc": accuracy}, buffers=inputs.statistics)
