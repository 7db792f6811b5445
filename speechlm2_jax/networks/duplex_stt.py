"""Duplex speech-to-text: user audio in, one text token of the agent per frame out.

The LLM reads the sum of the user's frame and the agent's previous token, and with a user-text head
also the user's previous token. The stages are those of `networks.duplex`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.batches import DuplexSttBatch, LossSum, StepLosses
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.linear import Embedding, Linear
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.stack import Remat
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.networks.duplex import DuplexModes, in_time_order, longest_of_group
from speechlm2_jax.networks.losses import chunked_cross_entropy
from speechlm2_jax.networks.salm import example_rngs
from speechlm2_jax.networks.stt_channels import (
    AlignmentRules,
    ChannelShifts,
    SttChannels,
    SttLengths,
    TokenWeights,
    align,
    loss_weights,
)
from speechlm2_jax.perception.perception import (
    AudioPerception,
    PerceptionConfig,
    PerceptionOutput,
)
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain, time_order


@dataclass(frozen=True, kw_only=True)
class TurnBoosts:
    """What inference adds to the agent's logits of control tokens; not in training."""

    pad: float = 0.0
    bos: float = 0.0
    eos: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DuplexSttConfig:
    """Architecture of a duplex speech-to-text network, independent of data."""

    llm: DecoderConfig
    perception: PerceptionConfig
    text: TextIds
    lora: LoraConfig | None = None
    has_user_text: bool = False
    """Whether a second head predicts the user's text."""
    text_loss_weight: float = 1.0
    user_text_loss_weight: float = 1.0
    user_channel_weight: float = 1.0
    text_channel_weight: float = 1.0
    user_text_channel_weight: float = 1.0
    shifts: ChannelShifts = ChannelShifts()
    token_weights: TokenWeights | None = None
    masks_sequence: bool = True
    boosts: TurnBoosts = TurnBoosts()
    nemo_exact: bool = False
    compute_dtype: str = "float32"
    """Dtype of activations; norms, softmax, mel and losses stay in fp32."""
    remat: Remat = Remat()

    def __post_init__(self) -> None:
        self.perception.check_width(self.llm.width)

    @property
    def alignment(self) -> AlignmentRules:
        """How the channels of a conversation are aligned."""
        return AlignmentRules(
            ids=self.text,
            shifts=self.shifts,
            has_user_text=self.has_user_text,
            masks_sequence=self.masks_sequence,
            nemo_exact=self.nemo_exact,
        )


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SttInputs:
    """Inputs of the `forward` stage. B is the number of groups times the sequences of a group."""

    embeds: Float[Array, "B T D"]
    channels: SttChannels
    statistics: dict[str, Array]
    """New batch-norm statistics by variable path."""


class SttLogits(NamedTuple):
    """Logits of both text channels; None without a user-text head."""

    text: Float[Array, "B T V"]
    user_text: Float[Array, "B T V"] | None


class DuplexStt(nnx.Module):
    """Perception in front of an LLM that predicts the agent's text, and the user's, per frame."""

    def __init__(self, config: DuplexSttConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.perception = AudioPerception(config.perception, rngs=rngs)
        self.llm = Decoder(config.llm, rngs=rngs, lora=config.lora)
        has_user = config.has_user_text
        self.user_embedding = _user_embedding(config.llm, rngs) if has_user else None
        self.user_head = _user_head(config.llm, rngs) if has_user else None

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of activations."""
        return jnp.dtype(self.config.compute_dtype)

    def embed(
        self,
        user: Float[Array, "B T D"],
        text: Int[Array, "B T"],
        user_text: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Sums the weighted embeddings of the user frame and of the previous tokens."""
        config = self.config
        embeds = self.llm.embed(text).astype(self.dtype) * config.text_channel_weight
        embeds = embeds + user.astype(self.dtype) * config.user_channel_weight
        if self.user_embedding is not None:
            theirs = self.user_embedding(user_text).astype(self.dtype)
            embeds = embeds + theirs * config.user_text_channel_weight
        return constrain(embeds, "batch", "time", "act_embed")

    def user_logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Computes the logits of the user's tokens in fp32. Only with a user-text head."""
        assert self.user_head is not None
        return constrain(self.user_head(hidden).astype(jnp.float32), "batch", "tokens", "act_vocab")

    def inference_logits(self, hidden: Float[Array, "B T D"]) -> SttLogits:
        """Computes the logits of both channels, with the boosts of control tokens."""
        text, ids, boosts = self.llm.logits(hidden), self.config.text, self.config.boosts
        for token, boost in ((ids.pad, boosts.pad), (ids.bos, boosts.bos), (ids.eos, boosts.eos)):
            if boost:
                text = text.at[..., token].add(boost)
        return SttLogits(text, None if self.user_head is None else self.user_logits(hidden))

    def new_state(self, batch: int, capacity: int, sinks: int | None = None) -> KVCache:
        """Makes the KV cache of `batch` conversations; arguments as for `Duplex.new_state`."""
        if sinks is None:
            return self.llm.new_cache(batch, capacity, self.dtype)
        return self.llm.sink_cache(batch, capacity, self.dtype, sinks)

    def decode_frame(
        self,
        state: KVCache,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        user_text: Int[Array, "B 1"],
    ) -> tuple[SttLogits, KVCache]:
        """Runs the next position. Returns logits [B, 1, V] and the new KV cache."""
        extended = self.llm.extend(
            self.embed(user, text, user_text),
            state,
            positions=jnp.broadcast_to(state.used[..., None], text.shape),
            attention_mask=jnp.ones(text.shape, bool),
        )
        return self.inference_logits(extended.hidden), extended.cache


def encode_user(
    network: DuplexStt,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    modes: DuplexModes,
    rngs: Key[Array, " B"] | None = None,
    extents: Int[Array, " B"] | None = None,
) -> PerceptionOutput:
    """Encodes the user's audio into LLM-width frames; arguments as in `networks.duplex`."""
    return network.perception(
        constrain(audio, "clips", None),
        lengths,
        modes=modes.perception,
        rngs=rngs,
        extents=extents,
        dtype=network.dtype,
        remat=network.config.remat.perception,
    )


def embed_prompts(network: DuplexStt, tokens: Int[Array, "B P"]) -> Float[Array, "B P D"]:
    """Looks up the embeddings of system prompts; P may be 0."""
    if not tokens.shape[1]:
        return jnp.zeros((*tokens.shape, network.config.llm.width), network.dtype)
    return network.llm.embed(tokens).astype(network.dtype)


def prepare(
    network: DuplexStt,
    batch: DuplexSttBatch[Array],
    modes: DuplexModes,
    rng: Key[Array, ""] | None = None,
) -> SttInputs:
    """Encodes the user's audio, aligns all channels and embeds them. Dropout needs `rng`."""
    config, per_group = network.config, batch.source_audio.shape[1]
    output = encode_user(
        network,
        _flat(batch.source_audio),
        batch.source_lengths.reshape(-1),
        modes,
        example_rngs(rng, batch.sequence_ids),
        jnp.repeat(batch.source_extent, per_group),
    )
    groups = jnp.repeat(jnp.arange(batch.source_audio.shape[0]), per_group)
    lengths = SttLengths(
        prompt=batch.prompt_lengths.reshape(-1),
        user=output.lengths,
        text=batch.token_lengths.reshape(-1),
        longest_prompt=jnp.repeat(batch.prompt_extent, per_group),
        longest_user=longest_of_group(output.lengths, groups),
        longest_text=jnp.repeat(batch.token_extent, per_group),
    )
    channels = align(
        output.frames,
        embed_prompts(network, _flat(batch.prompt_tokens)),
        _flat(batch.target_tokens),
        _flat(batch.source_tokens),
        lengths,
        config.alignment,
    )
    channels = in_time_order(channels, channels.text.shape[1])
    statistics = {f"perception.{path}": value for path, value in output.statistics.items()}
    embeds = network.embed(channels.user, channels.text, channels.user_text)
    return SttInputs(embeds=embeds, channels=channels, statistics=statistics)


def forward(
    network: DuplexStt,
    embeds: Float[Array, "B T D"],
    modes: DuplexModes,
    rngs: Key[Array, " B"] | None = None,
) -> Float[Array, "B T D"]:
    """Runs the LLM over whole conversations. Returns the hidden states before both heads."""
    shape = embeds.shape[:2]
    order = time_order(shape[1])
    positions = jnp.arange(shape[1]) if order is None else jnp.asarray(order)
    return network.llm(
        embeds,
        positions=jnp.broadcast_to(positions.astype(jnp.int32), shape),
        segments=jnp.ones(shape, jnp.int32),
        attention_mask=jnp.ones(shape, bool),
        unpacked=True,
        rngs=rngs if modes.llm else None,
        remat=network.config.remat.llm,
    )


def losses(
    network: DuplexStt,
    batch: DuplexSttBatch[Array],
    modes: DuplexModes,
    rng: Key[Array, ""] | None = None,
) -> StepLosses:
    """Computes weighted cross-entropies of both text channels, as sums over positions."""
    config, per_group = network.config, batch.source_audio.shape[1]
    user_rng, agent_rng = (None, None) if rng is None else jax.random.split(rng)
    inputs = prepare(network, batch, modes, user_rng)
    channels = inputs.channels
    hidden = forward(network, inputs.embeds, modes, example_rngs(agent_rng, batch.sequence_ids))
    count = jnp.sum(channels.frames).astype(jnp.float32)
    text, accuracy = _text_loss(network, hidden, channels, batch)
    total = config.text_loss_weight * text
    metrics = {"text_loss": LossSum(total=text, count=count), "text_acc": accuracy}
    if config.has_user_text:
        targets = channels.user_text_targets
        theirs, correct = chunked_cross_entropy(
            hidden,
            targets,
            channels.is_scored,
            network.user_logits,
            sequences_per_shard=per_group,
            weights=_weights(config, targets, None),
        )
        total = total + config.user_text_loss_weight * theirs.total
        metrics["user_text_loss"] = LossSum(total=theirs.total, count=count)
        metrics["user_text_acc"] = correct
    return StepLosses(
        loss=LossSum(total=total, count=count), metrics=metrics, buffers=inputs.statistics
    )


def _text_loss(
    network: DuplexStt,
    hidden: Float[Array, "B T D"],
    channels: SttChannels,
    batch: DuplexSttBatch[Array],
) -> tuple[Float[Array, ""], LossSum]:
    """The agent's loss, and the accuracy of its tokens but pads."""
    config, targets = network.config, channels.text_targets
    is_text = channels.is_counted & (targets != config.text.pad)
    is_asr = batch.is_asr
    if config.nemo_exact:  # NeMo looks at the first conversation of the batch
        is_asr = jnp.broadcast_to(is_asr[:, :1], is_asr.shape)
    loss, correct = chunked_cross_entropy(
        hidden,
        targets,
        channels.is_scored,
        network.llm.logits,
        sequences_per_shard=batch.source_audio.shape[1],
        weights=_weights(config, targets, is_asr.reshape(-1)),
        counted=is_text,
    )
    return loss.total, LossSum(total=correct.total, count=jnp.sum(is_text, dtype=jnp.float32))


def _weights(
    config: DuplexSttConfig, targets: Int[Array, "B T"], is_asr: Array | None
) -> Float[Array, "B T"] | None:
    """Factors of the loss; without `token_loss_weight` NeMo scores ASR data as all other."""
    if config.token_weights is None:
        return None
    return loss_weights(targets, config.text, config.token_weights, is_asr)


def _user_embedding(llm: DecoderConfig, rngs: nnx.Rngs) -> Embedding:
    init = jax.nn.initializers.normal(llm.init_std)
    return Embedding(llm.vocab_size, llm.width, rngs=rngs, init=init)


def _user_head(llm: DecoderConfig, rngs: nnx.Rngs) -> Linear:
    return Linear(
        llm.width,
        llm.vocab_size,
        axes=("vocab", "embed"),
        rngs=rngs,
        bias=llm.head_bias,
        init=jax.nn.initializers.normal(llm.init_std),
    )


def _flat(x: Array) -> Array:
    """[G, R, ...] -> [G x R, ...]; prompts may have no tokens."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
