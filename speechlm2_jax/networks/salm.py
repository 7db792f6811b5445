"""SALM: an LLM over one sequence of audio frames and text (arXiv 2310.09424; NeMo SpeechLM2 SALM).

There are three stages. Each is a pure function that parity tests compare with NeMo:

- `prepare`: audio and token ids -> input embeddings
- `forward`: embeddings -> hidden states
- `losses`: hidden states -> sums of losses
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
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
    """Architecture of a SALM, independent of data and training."""

    llm: DecoderConfig
    perception: PerceptionConfig
    lora: LoraConfig | None = None
    asr: TransducerConfig | None = None
    """The ASR model whose encoder perception shares (SALMWithAsrDecoder)."""
    compute_dtype: str = "float32"
    """Dtype of activations; norms, softmax, mel and losses stay in fp32."""
    remat: Remat = Remat()

    def __post_init__(self) -> None:
        self.perception.check_width(self.llm.width)


@dataclass(frozen=True, kw_only=True)
class SalmModes:
    """Which modules are in training mode. Frozen modules stay in evaluation mode, as in NeMo."""

    perception: PerceptionModes = PerceptionModes()
    llm: bool = False


@dataclass(frozen=True, kw_only=True)
class SalmInputs:
    """Inputs of the `forward` stage. B is the number of groups times the sequences of a group."""

    embeds: Float[Array, "B T D"]
    """Input embeddings of the LLM."""
    statistics: dict[str, Array]
    """New batch-norm statistics by variable path."""


class Salm(nnx.Module):
    """Perception (FastConformer -> modality adapter -> projection) and a decoder-only LLM."""

    def __init__(self, config: SalmConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.perception = (
            AudioPerception(config.perception, rngs=rngs)
            if config.asr is None
            else TransducerNetwork(config.asr, perception=config.perception, rngs=rngs)
        )
        self.llm = Decoder(config.llm, rngs=rngs, lora=config.lora)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.config.compute_dtype)


def example_rngs(rng: Key[Array, ""] | None, ids: Int[Array, "G R"]) -> Key[Array, " B"] | None:
    """Derives one random key per example from its index in the global batch.

    Returns None if `rng` is None.
    """
    if rng is None:
        return None
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(ids.reshape(-1))


def encode_audio(
    network: Salm, batch: SalmBatch[Array], modes: SalmModes, rng: Key[Array, ""] | None
) -> tuple[Float[Array, "G C F D"], dict[str, Array]]:
    """Encodes every clip independently into frames of the LLM's width.

    Returns the frames and the new batch-norm statistics.
    """
    groups, clips, samples = batch.audio.shape
    output = network.perception(
        constrain(batch.audio.reshape(groups * clips, samples), "clips", None),
        batch.audio_lengths.reshape(-1),
        modes=modes.perception,
        rngs=example_rngs(rng, batch.clip_ids),
        extents=jnp.repeat(batch.audio_extent, clips),
        dtype=network.dtype,
        remat=network.config.remat.perception,
    )
    frames = output.frames.reshape(groups, clips, *output.frames.shape[1:])
    return frames, output.statistics


def prepare(
    network: Salm, batch: SalmBatch[Array], modes: SalmModes, rng: Key[Array, ""] | None = None
) -> SalmInputs:
    """Embeds text, encodes audio, and interleaves them. Dropout needs `rng`."""
    if batch.audio.shape[1] == 0:
        return join(network, batch, None, {})
    return join(network, batch, *encode_audio(network, batch, modes, rng))


def join(
    network: Salm,
    batch: SalmBatch[Array],
    frames: Float[Array, "G C F D"] | None,
    statistics: dict[str, Array],
) -> SalmInputs:
    """Embeds the text of a batch and interleaves it with the frames of its clips.

    `frames` is None for a batch without clips.
    """
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
    batch: SalmBatch[Array],
    modes: SalmModes,
    rng: Key[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """Runs the LLM over interleaved embeddings. Returns hidden states after the final norm."""
    shape = embeds.shape[:2]
    return network.llm(
        embeds,
        positions=batch.positions.reshape(shape),
        segments=batch.segments.reshape(shape),
        attention_mask=batch.attention_mask.reshape(shape),
        unpacked=batch.unpacked,
        longest=batch.longest,
        rngs=example_rngs(rng, batch.sequence_ids) if modes.llm else None,
        remat=network.config.remat.llm,
    )


def losses(
    network: Salm, batch: SalmBatch[Array], modes: SalmModes, rng: Key[Array, ""] | None = None
) -> StepLosses:
    """Computes next-token cross-entropy and accuracy (`acc`) of the assistant's turns, as sums."""
    audio_rng, text_rng = split_rng(rng)
    return score(network, prepare(network, batch, modes, audio_rng), batch, modes, text_rng)


def split_rng(rng: Key[Array, ""] | None) -> tuple[Key[Array, ""] | None, Key[Array, ""] | None]:
    """Derives the keys of audio and of text from the key of a step; None, None of None."""
    if rng is None:
        return None, None
    audio_rng, text_rng = jax.random.split(rng)
    return audio_rng, text_rng


def score(
    network: Salm,
    inputs: SalmInputs,
    batch: SalmBatch[Array],
    modes: SalmModes,
    rng: Key[Array, ""] | None = None,
) -> StepLosses:
    """Runs the LLM over prepared inputs and sums the losses."""
    hidden = forward(network, inputs.embeds, batch, modes, rng)
    shape = hidden.shape[:2]
    mask: Bool[Array, "B T"] = batch.loss_mask.reshape(shape)
    loss, accuracy = chunked_cross_entropy(
        hidden,
        batch.targets.reshape(shape),
        mask,
        network.llm.logits,
        sequences_per_shard=batch.tokens.shape[1],
    )
    return StepLosses(loss=loss, metrics={"acc": accuracy}, buffers=inputs.statistics)
