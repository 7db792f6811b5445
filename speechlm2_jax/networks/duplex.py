"""What both full-duplex networks are made of, and how they learn.

Three stages, each a pure function and a parity point: `prepare` (audio and tokens -> aligned
channels and input embeddings), `forward` (embeddings -> hidden states of the text head and of the
audio head) and `losses` (hidden states -> sums). The networks differ in what the LLM sees of the
agent's audio, and in what predicts it.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.batches import DuplexBatch, LossSum, StepLosses
from speechlm2_jax.codec.codec import Codec
from speechlm2_jax.codec.config import CodecConfig
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import buffer, keep_fp32
from speechlm2_jax.layers.stack import Remat
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.networks.channels import (
    ChannelLengths,
    Channels,
    Codebooks,
    CodeEmbedding,
    TextIds,
    align,
)
from speechlm2_jax.networks.losses import chunked_cross_entropy
from speechlm2_jax.networks.salm import example_rngs
from speechlm2_jax.perception.perception import (
    AudioPerception,
    PerceptionConfig,
    PerceptionModes,
)
from speechlm2_jax.sharding import constrain, length_multiple, time_order
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig

RATE_TOLERANCE = 0.01
"""How far the frame rates of perception and codec may be apart: 1 frame in 100."""


@dataclass(frozen=True, kw_only=True)
class DuplexConfig:
    """Architecture of a full-duplex network; nothing here comes from data."""

    llm: DecoderConfig
    perception: PerceptionConfig
    codec: CodecConfig
    text: TextIds
    speech_decoder: SpeechDecoderConfig | None = None
    lora: LoraConfig | None = None
    text_loss_weight: float = 1.0
    audio_loss_weight: float = 1.0
    user_channel_weight: float = 1.0
    nemo_exact: bool = False
    compute_dtype: str = "float32"
    """Dtype of activations; norms, softmax, mel, codec and losses stay in fp32."""
    remat: Remat = Remat()

    def __post_init__(self) -> None:
        self.perception.check_width(self.llm.width)
        heard, spoken = self.perception.token_equivalent_duration, 1 / self.codec.frame_rate_hz
        if abs(heard / spoken - 1) > RATE_TOLERANCE:
            raise ValueError(
                f"perception makes a frame of {1e3 * heard:.1f} ms of the user's audio but the "
                f"codec one of {1e3 * spoken:.1f} ms of the agent's; use a codec and an encoder of "
                "one frame rate"
            )

    @property
    def books(self) -> Codebooks:
        """The agent's audio channel."""
        return Codebooks(count=self.codec.num_codebooks, size=self.codec.codebook_size)


@dataclass(frozen=True, kw_only=True)
class DuplexModes:
    """Which parts are in training mode; a frozen part stays in evaluation mode, as in NeMo."""

    perception: PerceptionModes = PerceptionModes()
    llm: bool = False
    speech_decoder: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DuplexInputs:
    """What the LLM sees, [B, T, D] with B = groups x rows, and what it shall say."""

    embeds: Any
    channels: Channels
    statistics: dict[str, Any]
    """New batch-norm statistics by variable path."""


class DuplexHidden(NamedTuple):
    """Hidden states before the two heads."""

    text: Float[Array, "B T D"]
    audio: Float[Array, "B T W"]


class Duplex(nnx.Module):
    """Perception and codec around an LLM that predicts a text token and K codes per frame."""

    def __init__(self, config: DuplexConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.perception = AudioPerception(config.perception, rngs=rngs)
        self.llm = Decoder(config.llm, rngs=rngs, lora=config.lora)
        self.codec = keep_fp32(Codec(config.codec, rngs=rngs))
        books = config.books
        self.code_embedding = CodeEmbedding(books, config.llm.width, rngs=rngs)
        self.audio_head = Linear(
            config.llm.width, books.count * books.vocab_size, axes=("vocab", "embed"), rngs=rngs
        )
        self.control_codes = buffer(jnp.array([books.bos, books.eos, books.delay]), (None,))

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.config.compute_dtype)

    @abstractmethod
    def embed(self, channels: Channels) -> Float[Array, "B T D"]:
        """Sums what the LLM sees of each frame."""

    @abstractmethod
    def speak(
        self,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        modes: DuplexModes,
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B T W"]:
        """Goes from the LLM's hidden states, and the codes so far, to what the audio head takes."""

    @abstractmethod
    def audio_logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T K V"]:
        """Scores every code of every codebook, in fp32."""

    @abstractmethod
    def new_state(self, batch: int, capacity: int) -> Any:
        """Makes the memory of `batch` conversations of up to `capacity` frames."""

    @abstractmethod
    def step(
        self,
        state: Any,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        codes: Int[Array, "B 1 K"],
    ) -> tuple[Float[Array, "B V"], Float[Array, "B K W"], Any]:
        """Runs the next frame: (text logits, audio logits, memory)."""

    def scored_codes(self, logits: Float[Array, "B T KV"]) -> Float[Array, "B T K V"]:
        """Splits the logits of a head over all codebooks."""
        books = self.config.books
        return logits.reshape(*logits.shape[:2], books.count, books.vocab_size)


def encode_user(
    network: Duplex,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    modes: DuplexModes = DuplexModes(),
    rngs: Key[Array, " B"] | None = None,
    extents: Int[Array, " B"] | None = None,
) -> Any:
    """Encodes the user's audio into LLM-width frames (a `PerceptionOutput`)."""
    return network.perception(
        constrain(audio, "clips", None),
        lengths,
        modes=modes.perception,
        rngs=rngs,
        extents=extents,
        dtype=network.dtype,
        remat=network.config.remat.perception,
    )


def encode_agent(network: Duplex, batch: DuplexBatch) -> tuple[Array, Array]:
    """Codes [B, C, K] of the agent's audio and their numbers [B]; no gradient reaches the codec."""
    rows = batch.target_audio.shape[1]
    config = network.config
    encoded = network.codec.encode(
        constrain(_flat(batch.target_audio), "batch", None),
        batch.target_lengths.reshape(-1),
        nemo_exact=config.nemo_exact,
        extent=jnp.repeat(batch.target_extent, rows) if config.nemo_exact else None,
    )
    return jax.lax.stop_gradient(encoded.codes), encoded.lengths


def prepare(
    network: Duplex, batch: DuplexBatch, modes: DuplexModes, key: Key[Array, ""] | None = None
) -> DuplexInputs:
    """Encodes both voices, aligns all channels, and sums them. Without `key` nothing is random."""
    config = network.config
    rows = batch.source_audio.shape[1]
    extents = jnp.repeat(batch.source_extent, rows)
    rngs = example_rngs(key, batch.sequence_ids)
    output = encode_user(
        network,
        _flat(batch.source_audio),
        batch.source_lengths.reshape(-1),
        modes,
        rngs,
        extents,
    )
    codes, code_lengths = encode_agent(network, batch)
    groups = jnp.repeat(jnp.arange(batch.source_audio.shape[0]), rows)
    lengths = ChannelLengths(
        user=output.lengths,
        agent=code_lengths,
        longest_user=_longest(output.lengths, groups),
        longest_agent=_longest(code_lengths, groups),
    )
    channels = align(
        output.frames,
        _flat(batch.target_tokens),
        codes,
        lengths,
        config.text,
        config.books,
        nemo_exact=config.nemo_exact,
    )
    channels = _as_laid_out(channels)
    embeds = constrain(network.embed(channels), "batch", "time", "act_embed")
    statistics = {f"perception.{path}": value for path, value in output.statistics.items()}
    return DuplexInputs(embeds=embeds, channels=channels, statistics=statistics)


def forward(
    network: Duplex,
    inputs: DuplexInputs,
    modes: DuplexModes,
    rngs: Key[Array, " B"] | None = None,
) -> DuplexHidden:
    """Runs the LLM over whole conversations, and what follows it up to the heads."""
    rows = inputs.embeds.shape[:2]
    order = time_order(rows[1])
    positions = jnp.arange(rows[1]) if order is None else jnp.asarray(order)
    hidden = network.llm(
        inputs.embeds,
        positions=jnp.broadcast_to(positions.astype(jnp.int32), rows),
        segments=jnp.ones(rows, jnp.int32),
        attention_mask=jnp.ones(rows, bool),
        rngs=rngs if modes.llm else None,
        remat=network.config.remat.llm,
    )
    return DuplexHidden(hidden, network.speak(hidden, inputs.channels.codes, modes, rngs))


def losses(
    network: Duplex, batch: DuplexBatch, modes: DuplexModes, key: Key[Array, ""] | None = None
) -> StepLosses:
    """Weighted cross-entropies of both channels and their accuracies, as sums over frames."""
    config = network.config
    user_key, agent_key = (None, None) if key is None else jax.random.split(key)
    inputs = prepare(network, batch, modes, user_key)
    hidden = forward(network, inputs, modes, example_rngs(agent_key, batch.sequence_ids))
    rows = batch.source_audio.shape[1]
    text, text_right = chunked_cross_entropy(
        hidden.text,
        inputs.channels.text_targets,
        inputs.channels.is_scored,
        network.llm.logits,
        rows_per_chunk=rows,
    )
    audio, audio_right = chunked_cross_entropy(
        hidden.audio,
        inputs.channels.code_targets,
        inputs.channels.is_scored,
        network.audio_logits,
        rows_per_chunk=rows,
    )
    count = jnp.sum(inputs.channels.frames).astype(jnp.float32)
    audio_total = audio.total / config.books.count
    total = config.text_loss_weight * text.total + config.audio_loss_weight * audio_total
    return StepLosses(
        loss=LossSum(total=total, count=count),
        metrics={
            "text_loss": LossSum(total=text.total, count=count),
            "audio_loss": LossSum(total=audio_total, count=count),
            "text_acc": text_right,
            "audio_acc": audio_right,
        },
        buffers=inputs.statistics,
    )


def _as_laid_out(channels: Channels) -> Channels:
    """Adds frames up to what the mesh needs, and puts them where it wants them."""
    steps = channels.text.shape[1]
    missing = -steps % length_multiple()
    order = time_order(steps + missing)

    def lay(x: Array) -> Array:
        if x.ndim == 1:
            return x
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return x if order is None else x[:, order]

    return jax.tree.map(lay, channels)


def _longest(lengths: Int[Array, " B"], groups: Int[Array, " B"]) -> Int[Array, " B"]:
    """For each row, the greatest length of its group."""
    return jnp.max(jnp.where(groups[:, None] == groups[None], lengths[None], 0), axis=1)


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])
