"""Cuts long recordings into overlapping chunks.

Chunks begin and end where the audio is quietest, so that few words are cut in two. An overlap is
transcribed with both of its chunks. `join_texts` finds the words that both texts share.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from speechlm2_jax.inference.long_form.pauses import FRAME_S, frame_power

DEFAULT_MAX_AUDIO_S = 40.0
"""The longest audio that canary-qwen-2.5b was trained on. Set `max_audio_s` for other models."""
OVERLAP_S = 2.0
OVERLAP_SHARE = (1 / 8, 1 / 4)
"""An overlap is at least 1/8 of a chunk and at least OVERLAP_S, but at most 1/4 of a chunk."""
QUIET_FRAMES = 15
"""Frames over which loudness is averaged to find a quiet place: 150 ms."""
SPEECH_LEVEL = 1e-3
"""A frame counts as speech if its power is above this fraction of the 95th percentile."""


class Chunk(NamedTuple):
    """A part of a recording, and how much of its speech lies in the overlaps."""

    start: int
    """First sample."""
    end: int
    """Sample after the last."""
    before: float = 0.0
    """Fraction of its speech, 0 to 1, that lies in the overlap with the previous chunk."""
    after: float = 0.0
    """Fraction of its speech, 0 to 1, that lies in the overlap with the next chunk."""


def cut(wave: Float[np.ndarray, " S"], *, rate_hz: int, max_s: float | None) -> list[Chunk]:
    """Cuts a recording into overlapping chunks of at most `max_s` seconds (None: one chunk).

    The last chunk may be shorter than the others, but not shorter than an overlap.
    """
    longest = len(wave) if max_s is None else int(max_s * rate_hz)
    if len(wave) <= longest:
        return [Chunk(0, len(wave))]
    hop = max(int(FRAME_S * rate_hz), 1)
    power = frame_power(wave, hop)
    spans = _spans(_smooth(power), hop, len(wave), longest)
    speech = np.cumsum(np.concatenate([[0], _is_speech(power)]))

    def speech_frames(start: int, end: int) -> int:
        return int(speech[-(-end // hop)] - speech[start // hop])

    chunks = []
    for number, (start, end) in enumerate(spans):
        whole = max(speech_frames(start, end), 1)
        before = speech_frames(start, spans[number - 1][1]) if number else 0
        after = speech_frames(spans[number + 1][0], end) if number + 1 < len(spans) else 0
        chunks.append(Chunk(start, end, before / whole, after / whole))
    return chunks


def _spans(level: np.ndarray, hop: int, samples: int, longest: int) -> list[tuple[int, int]]:
    """Starts and ends of chunks in samples.

    Each is the quietest place in a window whose length is half an overlap.
    """
    least, most = (longest * share for share in OVERLAP_SHARE)
    overlap = int(min(max(least, OVERLAP_S / FRAME_S * hop), most))
    spans, start = [], 0
    while samples - start > longest:
        end = _quietest(level, hop, start + longest - overlap // 2, start + longest)
        spans.append((start, end))
        around = end - overlap
        start = _quietest(level, hop, around - overlap // 4, around + overlap // 4)
    return [*spans, (start, samples)]


def _quietest(level: np.ndarray, hop: int, low: int, high: int) -> int:
    """The quietest sample in [low, high]: the middle of the first run of quietest frames."""
    first = low // hop
    window = level[first : high // hop + 1]
    found = np.flatnonzero(window == window.min())
    run = found[: 1 + np.flatnonzero(np.diff(found, append=found[-1] + 2) > 1)[0]]
    place = (first + int(run[len(run) // 2])) * hop + hop // 2
    return min(max(place, low), high)


def _smooth(power: np.ndarray) -> np.ndarray:
    """Moving average over QUIET_FRAMES frames, centred on each frame."""
    half = QUIET_FRAMES // 2
    padded = np.pad(power, (half + 1, half), mode="edge").astype(np.float64)
    sums = np.cumsum(padded)
    return np.maximum(sums[2 * half + 1 :] - sums[: -2 * half - 1], 0) / (2 * half + 1)


def _is_speech(power: np.ndarray) -> np.ndarray:
    """Bool per frame: whether it is loud enough for speech, relative to the 95th percentile."""
    return power > SPEECH_LEVEL * np.quantile(power, 0.95)
