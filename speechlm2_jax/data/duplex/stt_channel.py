"""Text channels of a duplex speech-to-text model: turns end in their last frame, words have times.

A text may have the times of its words, as frames since the turn's start: `<|3|> hello <|7|>`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.duplex.conversations import ChannelIds, FrameGrid, SpokenTurn, clean_text

_TIME = re.compile(r"<\|(\d+)\|>")
WordPosition = Literal["left", "right"]


@dataclass(frozen=True, kw_only=True)
class WordTimes:
    """How words with times are written into a channel."""

    position: WordPosition = "left"
    """Tokens of a word start with it, or end with it."""
    prepend_space: bool = True
    """Words but the first of a turn are tokenised with a space before them."""


def stt_channel(
    turns: Sequence[SpokenTurn],
    frames: int,
    *,
    grid: FrameGrid,
    text_to_ids: Callable[[str], list[int]],
    ids: ChannelIds,
    words: WordTimes | None = None,
) -> Int[np.ndarray, " T"]:
    """Writes turns into a channel of one token per frame, pads elsewhere.

    A turn is `bos` and its text, as much as its frames hold, and `eos` in the frame of its end; a
    later turn overwrites an earlier one. With `words` the times in a text place its words; without,
    they are removed. Raises AudioError for a text whose times are not two for each word.
    """
    channel = np.full(frames, ids.pad, np.int32)
    for turn in turns:
        start, end = grid.frame(turn.start_s), grid.frame(turn.end_s)
        if start >= frames:
            continue
        if words is not None and _TIME.search(turn.text):
            text = _timed(turn.text, end - start, text_to_ids, ids.pad, words)
        else:
            text = text_to_ids(clean_text(turn.text))
        tokens = [ids.bos, *text][: max(end - start, 0)][max(-start, 0) :]
        start = max(start, 0)
        tokens = tokens[: frames - start]
        channel[start : start + len(tokens)] = tokens
        if 0 <= end < frames:
            channel[end] = ids.eos
    return channel


def _timed(
    text: str, room: int, text_to_ids: Callable[[str], list[int]], pad: int, words: WordTimes
) -> list[int]:
    """The tokens of each frame of a turn of `room` frames."""
    times = [int(found) for found in _TIME.findall(text)]
    spelt = _TIME.sub("", text).split()
    if len(times) < 2 * len(spelt):
        raise AudioError(
            f"{text!r}: {len(spelt)} words need {2 * len(spelt)} times, got {len(times)}; give the "
            "start and the end of each",
            cause="word_times",
        )
    tokens = [pad] * max(room, 0)
    for number, word in enumerate(spelt):
        spaced = f" {word}" if number and words.prepend_space else word
        ids = text_to_ids(spaced)
        first, last = times[2 * number], times[2 * number + 1]
        if words.position == "left":
            last = min(first + len(ids), last)
        else:
            first = max(first, last - len(ids))
        for place, token in enumerate(ids[: max(last + 1 - first, 0)], start=first):
            if place < len(tokens):
                tokens[place] = token
    return tokens
