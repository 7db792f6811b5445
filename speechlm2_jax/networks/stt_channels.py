"""The channels of a duplex speech-to-text conversation: user audio, agent text and user text.

A system prompt precedes the first frame; its tokens are embedded in place of user audio. Each frame
then holds the user's encoded audio, one text token of the agent and, with a user-text head, one of
the user. NeMo: SpeechLM2 DuplexSTTModel.prepare_inputs.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.pytrees import register_pytree


@dataclass(frozen=True, kw_only=True)
class ChannelShifts:
    """Frames by which training moves text against audio."""

    advance_text: int = 0
    """The agent's text comes earlier; what comes before the first frame is dropped."""
    delay_text: int = 0
    """The agent's text comes later."""
    delay_eos: int = 0
    """Ends of the agent's turns come later, and replace what is there."""
    delay_bos: int = 0
    """Starts of the agent's turns come later, and replace what is there."""
    delay_user_text: int = 0
    """The user's text comes later."""


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Factors of the loss of a frame, by its target token."""

    pad: float = 1.0
    bos: float = 1.0
    eos: float = 1.0
    text: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AlignmentRules:
    """What the alignment of channels depends on beside the batch."""

    ids: TextIds
    shifts: ChannelShifts
    has_user_text: bool
    masks_sequence: bool
    nemo_exact: bool


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SttLengths:
    """Lengths of each conversation, [B], and of the longest of its group (`nemo_exact`)."""

    prompt: Int[Array, " B"]
    user: Int[Array, " B"]
    """Frames of the encoded audio."""
    text: Int[Array, " B"]
    """Frames of the text channels."""
    longest_prompt: Int[Array, " B"]
    longest_user: Int[Array, " B"]
    longest_text: Int[Array, " B"]


@register_pytree
@dataclass(frozen=True, kw_only=True)
class SttChannels:
    """Inputs of the network in each position, and the targets that it predicts from them."""

    user: Float[Array, "B T D"]
    """Embeddings of the system prompt, then encoded audio of the user."""
    text: Int[Array, "B T"]
    text_targets: Int[Array, "B T"]
    user_text: Int[Array, "B T"]
    user_text_targets: Int[Array, "B T"]
    is_scored: Bool[Array, "B T"]
    is_counted: Bool[Array, "B T"]
    """Whether the position counts for the accuracy if its target is no pad."""
    frames: Int[Array, " B"]
    """Positions of each conversation, by whose sum the summed loss is divided."""


def align(
    user: Float[Array, "B T_user D"],
    prompt: Float[Array, "B P D"],
    text: Int[Array, "B T_text"],
    user_text: Int[Array, "B T_text"],
    lengths: SttLengths,
    rules: AlignmentRules,
) -> SttChannels:
    """Sets the channels behind the prompt, shifts the texts and makes the targets.

    A position reads the tokens of its frame and predicts those of the next. Positions are scored
    up to the shorter of audio and text; without `masks_sequence`, up to the end of the audio. With
    `nemo_exact` they are scored as NeMo's masks have it, where one frame of padding, or all of it,
    counts in the sum; the divisor stays the number of real positions.
    """
    ids, shifts = rules.ids, rules.shifts
    width = prompt.shape[1] + user.shape[1]
    end, limit = _ends(lengths, rules)
    last = jnp.maximum(limit - 1, 0)
    written = lengths.prompt + lengths.text
    scored = jnp.minimum(jnp.minimum(written, limit), last) if rules.masks_sequence else last
    is_conversation = lengths.user > 0
    own = lengths.prompt + (lengths.user if rules.nemo_exact else limit - lengths.prompt) - 1
    scored, last, frames = (jnp.where(is_conversation, n, 0) for n in (scored, last, own))
    agent = _placed(text, lengths.prompt, lengths.text, width, ids.pad)
    agent = shifted_text(jnp.where(_before(end, width), agent, ids.pad), end, ids, shifts)
    theirs = _placed(user_text, lengths.prompt, lengths.text, width, ids.pad)
    theirs = _delayed(theirs, shifts.delay_user_text, ids.pad)
    return SttChannels(
        user=_joined(prompt, user, lengths)[:, :-1],
        text=agent[:, :-1],
        text_targets=agent[:, 1:],
        user_text=theirs[:, :-1],
        user_text_targets=theirs[:, 1:],
        is_scored=_before(scored, width - 1),
        is_counted=_before(last, width - 1),
        frames=jnp.maximum(frames, 0),
    )


def _ends(lengths: SttLengths, rules: AlignmentRules) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Where the agent's channel ends before the shifts, and where all channels end."""
    if not rules.nemo_exact:
        end = lengths.prompt + jnp.minimum(lengths.user, lengths.text)
        return end, end
    end = lengths.longest_prompt + lengths.longest_user
    if not rules.has_user_text:
        return end, end
    return end, jnp.minimum(end, lengths.longest_prompt + lengths.longest_text)


def shifted_text(
    text: Int[Array, "B T"], end: Int[Array, " B"], ids: TextIds, shifts: ChannelShifts
) -> Int[Array, "B T"]:
    """Moves the agent's text, then the ends and the starts of its turns; `end` of each channel."""
    text = _advanced(text, shifts.advance_text, ids.pad)
    text = _delayed(text, shifts.delay_text, ids.pad)
    text = jnp.where(_before(end, text.shape[1]), text, ids.pad)
    text = _with_later(text, ids.eos, shifts.delay_eos, end, ids.pad)
    return _with_later(text, ids.bos, shifts.delay_bos, end, ids.pad)


def loss_weights(
    targets: Int[Array, "B T"],
    ids: TextIds,
    weights: TokenWeights,
    is_asr: Bool[Array, " B"] | None = None,
) -> Float[Array, "B T"]:
    """Factors of the loss by target; 0 after the first start of a turn in ASR data."""
    factors = jnp.full(targets.shape, weights.text, jnp.float32)
    for token, factor in (
        (ids.eos, weights.eos),
        (ids.bos, weights.bos),
        (ids.pad, weights.pad),
    ):
        factors = jnp.where(targets == token, factor, factors)
    if is_asr is None:
        return factors
    is_start = targets == ids.bos
    begun = jnp.cumsum(is_start, axis=1) - is_start  # starts before this position
    return jnp.where(is_asr[:, None] & (begun > 0), 0.0, factors)


def place_after_prompt(
    prompt: Float[Array, "B P D"],
    user: Float[Array, "B T D"],
    prompt_lengths: Int[Array, " B"],
    user_lengths: Int[Array, " B"],
) -> Float[Array, "B PT D"]:
    """Each row: its prompt, its audio frames, zeros."""
    prompt_width, width = prompt.shape[1], prompt.shape[1] + user.shape[1]
    index = jnp.arange(width)[None] - prompt_lengths[:, None]
    frames = jnp.take_along_axis(user, jnp.clip(index, 0, user.shape[1] - 1)[..., None], axis=1)
    frames = jnp.where(((index >= 0) & (index < user_lengths[:, None]))[..., None], frames, 0)
    if not prompt_width:
        return frames
    head = jnp.pad(prompt, ((0, 0), (0, user.shape[1]), (0, 0)))
    return jnp.where((index < 0)[..., None], head, frames)


def _joined(
    prompt: Float[Array, "B P D"], user: Float[Array, "B T D"], lengths: SttLengths
) -> Float[Array, "B PT D"]:
    """As `place_after_prompt`, with the encoder's own frames of padding if nothing has a prompt."""
    if not prompt.shape[1]:
        return user
    return place_after_prompt(prompt, user, lengths.prompt, lengths.user)


def _placed(
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    width: int,
    pad: int,
) -> Int[Array, "B W"]:
    """Each row of tokens from its start on, pad elsewhere."""
    index = jnp.arange(width)[None] - starts[:, None]
    inside = (index >= 0) & (index < lengths[:, None])
    found = jnp.take_along_axis(tokens, jnp.clip(index, 0, tokens.shape[1] - 1), axis=1)
    return jnp.where(inside, found, pad)


def _before(ends: Int[Array, " B"], width: int) -> Bool[Array, "B W"]:
    return jnp.arange(width)[None] < ends[:, None]


def _advanced(values: Array, by: int, fill: int | bool) -> Array:
    """[B, T] moved to the front, with `fill` at the end."""
    width = values.shape[1]
    return jnp.pad(values, ((0, 0), (0, by)), constant_values=fill)[:, by : by + width]


def _delayed(values: Array, by: int, fill: int | bool) -> Array:
    """[B, T] moved to the end, with `fill` at the front."""
    return jnp.pad(values, ((0, 0), (by, 0)), constant_values=fill)[:, : values.shape[1]]


def _with_later(
    text: Int[Array, "B T"], token: int, by: int, end: Int[Array, " B"], pad: int
) -> Int[Array, "B T"]:
    """Moves a token later, unless it would leave the channel or reach another of its kind."""
    if not by:
        return text
    is_token = text == token
    is_free = ~_advanced(is_token, by, False) & _before(end - by, text.shape[1])
    moves = is_token & is_free
    text = jnp.where(moves, pad, text)
    return jnp.where(_delayed(moves, by, False), token, text)
