"""The channels of a full-duplex conversation: user audio, agent text and agent audio codes.

Each frame (80 ms) holds the user's encoded audio, one text token of the agent and K audio codes of
the agent. The codes are delayed by one frame against the text. Both duplex networks read and
predict these channels (NeMo SpeechLM2 DuplexS2SModel.prepare_inputs).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.module import param
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class TextIds:
    """Control tokens of the agent's text channel."""

    pad: int
    """A frame without a text token."""
    bos: int
    """Start of an agent turn."""
    eos: int
    """End of an agent turn."""


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """Codebooks of the agent's audio channel, with three control codes added to each."""

    count: int
    """Number of codebooks K: codes per frame."""
    size: int
    """Codes of each codebook, without control codes."""

    @property
    def vocab_size(self) -> int:
        """Codes of each codebook, with control codes."""
        return self.size + 3

    @property
    def bos(self) -> int:
        """Control code at the start of an agent turn."""
        return self.size

    @property
    def eos(self) -> int:
        """Control code at the end of an agent turn."""
        return self.size + 1

    @property
    def delay(self) -> int:
        """Control code before the first frame."""
        return self.size + 2


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Channels:
    """Inputs of the network in each frame, and the targets that it predicts from them."""

    user: Float[Array, "B T D"]
    """Encoded audio of the user."""
    text: Int[Array, "B T"]
    codes: Int[Array, "B T K"]
    text_targets: Int[Array, "B T"]
    code_targets: Int[Array, "B T K"]
    is_scored: Bool[Array, "B T"]
    frames: Int[Array, " B"]
    """Number of frames of each conversation by which the summed loss is divided."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class ChannelLengths:
    """Frames of the channels of each conversation; [B]."""

    user: Int[Array, " B"]
    agent: Int[Array, " B"]
    longest_user: Int[Array, " B"]
    """Frames of the longest user channel in the group. NeMo pads to it; read by `nemo_exact`."""
    longest_agent: Int[Array, " B"]
    """Frames of the longest agent channel in the group; read by `nemo_exact`."""


def align(
    user: Float[Array, "B T_user D"],
    text: Int[Array, "B T_text"],
    codes: Int[Array, "B T_codes K"],
    lengths: ChannelLengths,
    ids: TextIds,
    codebooks: Codebooks,
    *,
    nemo_exact: bool = False,
) -> Channels:
    """Aligns the channels and makes the targets.

    - User audio and codes are truncated to the shorter of the two.
    - The text is truncated or padded to the same length.
    - Control codes mark the starts and ends of the agent's turns.
    - The codes are delayed by one frame.
    - Targets are the channels shifted by one frame: frame t reads text t and codes t - 1, and
      predicts text t + 1 and codes t.

    The loss is summed over the real frames of a conversation and divided by their number. With
    `nemo_exact` the sum also runs over padding, up to the longest conversation of the group. The
    divisor stays the number of real frames.
    """
    length = min(user.shape[1], codes.shape[1])
    text = _with_length(text, length, ids.pad)
    codes = mark_turns(codes[:, :length], text, ids, codebooks)
    delayed = jnp.pad(codes[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=codebooks.delay)
    is_conversation = lengths.user > 0
    if nemo_exact:
        frames = jnp.minimum(lengths.user, lengths.longest_agent)
        scored = jnp.minimum(lengths.longest_user, lengths.longest_agent)
    else:
        frames = scored = jnp.minimum(lengths.user, lengths.agent)
    frames, scored = (
        jnp.where(is_conversation, jnp.maximum(n - 1, 0), 0) for n in (frames, scored)
    )
    return Channels(
        user=user[:, : length - 1],
        text=text[:, :-1],
        codes=delayed[:, :-1],
        text_targets=text[:, 1:],
        code_targets=delayed[:, 1:],
        is_scored=jnp.arange(length - 1)[None] < scored[:, None],
        frames=frames,
    )


def mark_turns(
    codes: Int[Array, "B T K"], text: Int[Array, "B T"], ids: TextIds, codebooks: Codebooks
) -> Int[Array, "B T K"]:
    """Replaces codes by control codes where the text channel starts or ends a turn."""
    codes = jnp.where((text == ids.bos)[..., None], codebooks.bos, codes)
    return jnp.where((text == ids.eos)[..., None], codebooks.eos, codes)


def without_control(
    codes: Int[Array, "B T K"],
    silence: Int[Array, " K"],
    codebooks: Codebooks,
    *,
    nemo_exact: bool = False,
) -> Int[Array, "B T K"]:
    """Replaces control codes, which a codec cannot decode, by the codes of the first frame.

    The first frame of a conversation is silence. Where the first frame itself holds a control code,
    the replacement is `silence`, the codes to which the codec encodes silence. With `nemo_exact`
    that control code stays: the codec reduces it modulo the codebook size.
    """
    first = codes[:, :1]
    if not nemo_exact:
        first = jnp.where(first >= codebooks.size, silence[None, None], first)
    return jnp.where(codes >= codebooks.size, first, codes)


class CodeEmbedding(nnx.Module):
    """One embedding table per codebook, control codes included.

    The embedding of a frame is the sum over its K codes.
    """

    def __init__(self, codebooks: Codebooks, width: int, *, rngs: nnx.Rngs):
        shape = (codebooks.count, codebooks.vocab_size, width)
        # torch's default for an embedding
        init = jax.nn.initializers.normal(1.0)
        self.weight = param(rngs, shape, ("layers", "vocab", "embed"), init)

    def __call__(
        self, codes: Int[Array, "B T K"], start: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Adds the embeddings of all codes to `start`. Returns the sum in the dtype of `start`."""
        tables = constrain(self.weight[...], None, "vocab", None)
        for k, table in enumerate(tables):
            start = start + jnp.take(table, codes[..., k], axis=0).astype(start.dtype)
        return start


def _with_length(text: Int[Array, "B T_text"], length: int, pad: int) -> Int[Array, "B T"]:
    """Truncates or pads to `length` frames."""
    missing = max(length - text.shape[1], 0)
    return jnp.pad(text[:, :length], ((0, 0), (0, missing)), constant_values=pad)
