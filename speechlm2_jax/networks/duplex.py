"""The base class of both full-duplex networks, and the losses of both.

There are three stages. Each is a pure function that parity tests compare with NeMo:

- `prepare`: audio and tokens -> aligned channels and input embeddings
- `forward`: embeddings -> hidden states of the text head and of the audio head
- `losses`: hidden states -> sums of losses

The networks differ in two points: whether the LLM reads the agent's audio codes, and which module
predicts them.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from speechlm2_jax.batches import DuplexBatch, LossSum, StepLosses
from speechlm2_jax.codec.codec import Codec
from speechlm2_jax.codec.config import CodecConfig
from speechlm2_jax.layers.cache import KVCache
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
    PerceptionOutput,
)
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain, length_multiple, time_order
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig

C = TypeVar("C")
RATE_TOLERANCE = 0.01
"""Largest relative difference of the frame durations of perception and codec."""


@dataclass(frozen=True, kw_only=True)
class DuplexConfig:
    """Architecture of a full-duplex network, independent of data."""

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
        user_s, agent_s = self.perception.token_equivalent_duration, 1 / self.codec.frame_rate_hz
        if abs(user_s / agent_s - 1) > RATE_TOLERANCE:
            raise ValueError(
                f"frames of perception last {1e3 * user_s:.1f} ms but frames of the codec "
                f"{1e3 * agent_s:.1f} ms; use a codec and an encoder with the same frame rate"
            )

    @property
    def codebooks(self) -> Codebooks:
        """Codebooks of the agent's audio channel."""
        return Codebooks(count=self.codec.num_codebooks, size=self.codec.codebook_size)

    @property
    def max_frames(self) -> int | None:
        """Frame limit of a conversation: learnt positions of a speech decoder; None: no limit."""
        decoder = self.speech_decoder
        if decoder is None or not decoder.use_learnable_pos_emb:
            return None
        return decoder.max_length_causal_mask


@dataclass(frozen=True, kw_only=True)
class DuplexModes:
    """Which modules are in training mode. Frozen modules stay in evaluation mode, as in NeMo."""

    perception: PerceptionModes = PerceptionModes()
    llm: bool = False
    speech_decoder: bool = False


@register_pytree
@dataclass(frozen=True, kw_only=True)
class DuplexInputs:
    """Inputs of the `forward` stage. B is the number of groups times the sequences of a group."""

    embeds: Float[Array, "B T D"]
    """Input embeddings of the LLM."""
    channels: Channels
    statistics: dict[str, Array]
    """New batch-norm statistics by variable path."""


class DuplexHidden(NamedTuple):
    """Hidden states before the text head and the audio head."""

    text: Float[Array, "B T D"]
    audio: Float[Array, "B T W"]
    """W is the width of the LLM, or of the speech decoder if the network has one."""


class Duplex(nnx.Module):
    """Perception and codec around an LLM that predicts a text token and K codes per frame."""

    def __init__(self, config: DuplexConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.perception = AudioPerception(config.perception, rngs=rngs)
        self.llm = Decoder(config.llm, rngs=rngs, lora=config.lora)
        self.codec = keep_fp32(Codec(config.codec, rngs=rngs))
        codebooks = config.codebooks
        self.code_embedding = CodeEmbedding(codebooks, config.llm.width, rngs=rngs)
        self.audio_head = Linear(
            config.llm.width,
            codebooks.count * codebooks.vocab_size,
            axes=("vocab", "embed"),
            rngs=rngs,
        )
        control_codes = jnp.array([codebooks.bos, codebooks.eos, codebooks.delay])
        self.control_codes = buffer(control_codes, (None,))

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.config.compute_dtype)

    @abstractmethod
    def embed(self, channels: Channels) -> Float[Array, "B T D"]:
        """Computes the LLM's input embedding of each frame."""

    @abstractmethod
    def audio_hidden(
        self,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        modes: DuplexModes,
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B T W"]:
        """Computes the audio head's input from the LLM's hidden states and the previous codes."""

    @abstractmethod
    def audio_logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T K V"]:
        """Computes the logits of every code of every codebook, in fp32."""

    @abstractmethod
    def new_state(self, batch: int, capacity: int, sinks: int | None = None) -> PyTree:
        """Makes the initial decoding state of `batch` conversations of up to `capacity` frames.

        With `sinks` they may go on without end: a frame attends to the first `sinks` frames and to
        the last `capacity - sinks`.
        """

    @abstractmethod
    def decode_frame(
        self,
        state: PyTree,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        codes: Int[Array, "B 1 K"],
        is_real: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B K W"], PyTree]:
        """Runs the next frame. Returns text logits, audio logits and the new state.

        Conversations whose frame is not real keep their state; that needs a state with `sinks`.
        """

    def new_cache(self, batch: int, capacity: int, sinks: int | None) -> KVCache:
        """Makes the LLM's KV cache; arguments as for `new_state`."""
        if sinks is None:
            return self.llm.new_cache(batch, capacity, self.dtype)
        return self.llm.sink_cache(batch, capacity, self.dtype, sinks)

    def split_codebooks(self, logits: Float[Array, "B T KV"]) -> Float[Array, "B T K V"]:
        """Splits the output of one head for all codebooks into one axis per codebook."""
        codebooks = self.config.codebooks
        return logits.reshape(*logits.shape[:2], codebooks.count, codebooks.vocab_size)


def encode_user(
    network: Duplex,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    modes: DuplexModes = DuplexModes(),
    rngs: Key[Array, " B"] | None = None,
    extents: Int[Array, " B"] | None = None,
) -> PerceptionOutput:
    """Encodes the user's audio into LLM-width frames (a `PerceptionOutput`).

    `extents` are the lengths in samples to which NeMo would pad each recording.
    """
    return network.perception(
        constrain(audio, "clips", None),
        lengths,
        modes=modes.perception,
        rngs=rngs,
        extents=extents,
        dtype=network.dtype,
        remat=network.config.remat.perception,
    )


def encode_agent(network: Duplex, batch: DuplexBatch[Array]) -> tuple[Array, Array]:
    """Encodes the agent's audio: codes [B, T, K] and lengths [B]. The codec gets no gradient."""
    per_group = batch.target_audio.shape[1]
    config = network.config
    encoded = network.codec.encode(
        constrain(_flat(batch.target_audio), "batch", None),
        batch.target_lengths.reshape(-1),
        nemo_exact=config.nemo_exact,
        extent=jnp.repeat(batch.target_extent, per_group) if config.nemo_exact else None,
    )
    return jax.lax.stop_gradient(encoded.codes), encoded.lengths


def prepare(
    network: Duplex,
    batch: DuplexBatch[Array],
    modes: DuplexModes,
    rng: Key[Array, ""] | None = None,
) -> DuplexInputs:
    """Encodes both audio channels, aligns all channels and embeds them. Dropout needs `rng`."""
    config = network.config
    per_group = batch.source_audio.shape[1]
    extents = jnp.repeat(batch.source_extent, per_group)
    rngs = example_rngs(rng, batch.sequence_ids)
    output = encode_user(
        network,
        _flat(batch.source_audio),
        batch.source_lengths.reshape(-1),
        modes,
        rngs,
        extents,
    )
    codes, code_lengths = encode_agent(network, batch)
    groups = jnp.repeat(jnp.arange(batch.source_audio.shape[0]), per_group)
    lengths = ChannelLengths(
        user=output.lengths,
        agent=code_lengths,
        longest_user=longest_of_group(output.lengths, groups),
        longest_agent=longest_of_group(code_lengths, groups),
    )
    channels = align(
        output.frames,
        _flat(batch.target_tokens),
        codes,
        lengths,
        config.text,
        config.codebooks,
        nemo_exact=config.nemo_exact,
    )
    channels = in_time_order(channels, channels.text.shape[1])
    embeds = constrain(network.embed(channels), "batch", "time", "act_embed")
    statistics = {f"perception.{path}": value for path, value in output.statistics.items()}
    return DuplexInputs(embeds=embeds, channels=channels, statistics=statistics)


def forward(
    network: Duplex,
    inputs: DuplexInputs,
    modes: DuplexModes,
    rngs: Key[Array, " B"] | None = None,
) -> DuplexHidden:
    """Runs the LLM over whole conversations, and the network up to both heads."""
    shape = inputs.embeds.shape[:2]
    order = time_order(shape[1])
    positions = jnp.arange(shape[1]) if order is None else jnp.asarray(order)
    hidden = network.llm(
        inputs.embeds,
        positions=jnp.broadcast_to(positions.astype(jnp.int32), shape),
        segments=jnp.ones(shape, jnp.int32),
        attention_mask=jnp.ones(shape, bool),
        unpacked=True,
        rngs=rngs if modes.llm else None,
        remat=network.config.remat.llm,
    )
    return DuplexHidden(hidden, network.audio_hidden(hidden, inputs.channels.codes, modes, rngs))


def losses(
    network: Duplex,
    batch: DuplexBatch[Array],
    modes: DuplexModes,
    rng: Key[Array, ""] | None = None,
) -> StepLosses:
    """Computes cross-entropy and accuracy of the agent's text and codes, as sums over frames.

    The loss is the weighted sum of both cross-entropies.
    """
    config = network.config
    user_rng, agent_rng = (None, None) if rng is None else jax.random.split(rng)
    inputs = prepare(network, batch, modes, user_rng)
    hidden = forward(network, inputs, modes, example_rngs(agent_rng, batch.sequence_ids))
    per_group = batch.source_audio.shape[1]
    text, text_correct = chunked_cross_entropy(
        hidden.text,
        inputs.channels.text_targets,
        inputs.channels.is_scored,
        network.llm.logits,
        sequences_per_shard=per_group,
    )
    audio, audio_correct = chunked_cross_entropy(
        hidden.audio,
        inputs.channels.code_targets,
        inputs.channels.is_scored,
        network.audio_logits,
        sequences_per_shard=per_group,
    )
    count = jnp.sum(inputs.channels.frames).astype(jnp.float32)
    audio_total = audio.total / config.codebooks.count
    total = config.text_loss_weight * text.total + config.audio_loss_weight * audio_total
    return StepLosses(
        loss=LossSum(total=total, count=count),
        metrics={
            "text_loss": LossSum(total=text.total, count=count),
            "audio_loss": LossSum(total=audio_total, count=count),
            "text_acc": text_correct,
            "audio_acc": audio_correct,
        },
        buffers=inputs.statistics,
    )


def in_time_order(channels: C, length: int) -> C:
    """Pads channels of `length` to `length_multiple`, reordered for context parallelism."""
    missing = -length % length_multiple()
    order = time_order(length + missing)

    def reordered(x: Array) -> Array:
        if x.ndim == 1:
            return x
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return x if order is None else x[:, order]

    return jax.tree.map(reordered, channels)


def longest_of_group(lengths: Int[Array, " B"], groups: Int[Array, " B"]) -> Int[Array, " B"]:
    """For each conversation, the greatest length in its group."""
    return jnp.max(jnp.where(groups[:, None] == groups[None], lengths[None], 0), axis=1)


def _flat(x: Array) -> Array:
    """[G, R, ...] -> [G x R, ...]."""
    return x.reshape(-1, *x.shape[2:])
