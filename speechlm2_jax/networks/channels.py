"""The streams of a full-duplex conversation, one frame (80 ms) after another.

A frame holds what the user says (encoded), the agent's text token and its K audio codes. The codes
run one frame behind the text. Both duplex networks see and predict these streams (NeMo SpeechLM2
DuplexS2SModel.prepare_inputs).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.module import param
from speechlm2_jax.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class TextIds:
    """Token ids that steer the agent's text channel."""

    pad: int
    """Nothing new is said in this frame."""
    bos: int
    """The agent starts to speak."""
    eos: int
    """The agent stops."""


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """The agent's audio channel: K codes a frame, and three control codes in each codebook."""

    count: int
    size: int

    @property
    def vocab_size(self) -> int:
        """Codes of a codebook, control codes included."""
        return self.size + 3

    @property
    def bos(self) -> int:
        """The agent starts to speak."""
        return self.size

    @property
    def eos(self) -> int:
        """The agent stops."""
        return self.size + 1

    @property
    def delay(self) -> int:
        """Before the first frame."""
        return self.size + 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Channels:
    """What a network sees in each frame, and what it shall say in the next."""

    user: Float[Array, "B T D"]
    """Encoded audio of the user."""
    text: Int[Array, "B T"]
    codes: Int[Array, "B T K"]
    text_targets: Int[Array, "B T"]
    code_targets: Int[Array, "B T K"]
    is_scored: Bool[Array, "B T"]
    frames: Int[Array, " B"]
    """Frames by which the loss of a row is divided."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ChannelLengths:
    """How many frames the streams of each row have; [B]."""

    user: Any
    agent: Any
    longest_user: Any
    """Of the row's group, padding included as NeMo pads it (`nemo_exact`)."""
    longest_agent: Any


def align(
    user: Float[Array, "B F D"],
    text: Int[Array, "B N"],
    codes: Int[Array, "B C K"],
    lengths: ChannelLengths,
    ids: TextIds,
    books: Codebooks,
    *,
    nemo_exact: bool = False,
) -> Channels:
    """Cuts the streams to one length, marks turns among the codes, delays these, and shifts.

    Frame t sees the text of t and the codes of t - 1, and predicts the text of t + 1 and the codes
    of t. A row counts its own real frames; with `nemo_exact` every frame up to the longest row of
    its group is scored, and still only the real ones are counted.
    """
    steps = min(user.shape[1], codes.shape[1])
    text = _resized(text, steps, ids.pad)
    codes = mark_turns(codes[:, :steps], text, ids, books)
    delayed = jnp.pad(codes[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=books.delay)
    is_row = lengths.user > 0
    if nemo_exact:
        frames = jnp.minimum(lengths.user, lengths.longest_agent)
        scored = jnp.minimum(lengths.longest_user, lengths.longest_agent)
    else:
        frames = scored = jnp.minimum(lengths.user, lengths.agent)
    frames, scored = (jnp.where(is_row, jnp.maximum(n - 1, 0), 0) for n in (frames, scored))
    return Channels(
        user=user[:, : steps - 1],
        text=text[:, :-1],
        codes=delayed[:, :-1],
        text_targets=text[:, 1:],
        code_targets=delayed[:, 1:],
        is_scored=jnp.arange(steps - 1)[None] < scored[:, None],
        frames=frames,
    )


def mark_turns(
    codes: Int[Array, "B T K"], text: Int[Array, "B T"], ids: TextIds, books: Codebooks
) -> Int[Array, "B T K"]:
    """Puts the control codes where the text channel says that a turn starts or ends."""
    codes = jnp.where((text == ids.bos)[..., None], books.bos, codes)
    return jnp.where((text == ids.eos)[..., None], books.eos, codes)


def without_control(
    codes: Int[Array, "B T K"],
    silence: Int[Array, " K"],
    books: Codebooks,
    *,
    nemo_exact: bool = False,
) -> Int[Array, "B T K"]:
    """Codes that a codec can speak: control codes become those of the row's first frame.

    That is silence, as the model learnt it; where it is a control code itself, the codec's own
    `silence` is used. With `nemo_exact` it stays, and the codec takes it modulo its codebook.
    """
    first = codes[:, :1]
    if not nemo_exact:
        first = jnp.where(first >= books.size, silence[None, None], first)
    return jnp.where(codes >= books.size, first, codes)


class CodeEmbedding(nnx.Module):
    """One table of vectors per codebook, control codes included; a frame is the sum of its K."""

    def __init__(self, books: Codebooks, width: int, *, rngs: nnx.Rngs):
        shape = (books.count, books.vocab_size, width)
        # torch's default for an embedding
        init = jax.nn.initializers.normal(1.0)
        self.weight = param(rngs, shape, ("layers", "vocab", "embed"), init)

    def __call__(
        self, codes: Int[Array, "B T K"], start: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Adds the codes' vectors to `start`, codebook by codebook, in its dtype."""
        tables = constrain(self.weight[...], None, "vocab", None)
        for k, table in enumerate(tables):
            start = start + jnp.take(table, codes[..., k], axis=0).astype(start.dtype)
        return start


def _resized(text: Int[Array, "B N"], steps: int, pad: int) -> Int[Array, "B T"]:
    missing = max(steps - text.shape[1], 0)
    return jnp.pad(text[:, :steps], ((0, 0), (0, missing)), constant_values=pad)
