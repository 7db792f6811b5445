"""Recordings longer than a model hears at once, cut into chunks that overlap.

Both edges of every chunk lie where it is quietest, so that few words are cut in two, and every
overlap is heard twice: `joining` finds the words that both chunks say.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DEFAULT_MAX_AUDIO_S = 40.0
"""What canary-qwen-2.5b was trained on; other models are told theirs."""
OVERLAP_S = 2.0
OVERLAP_SHARE = (1 / 8, 1 / 4)
"""An overlap is this share of a chunk: at least the first, or OVERLAP_S, but never the second."""
FRAME_S = 0.01
QUIET_FRAMES = 15
"""Frames over which it must be quiet for a cut."""
SPEECH_LEVEL = 1e-3
"""Of loud speech's power; what is louder counts as speech."""


class Chunk(NamedTuple):
    """A stretch of a recording, and how much of its speech its neighbours hear too."""

    start: int
    """In samples."""
    end: int
    before: float = 0.0
    """The share of its speech, from 0 to 1, that lies in the overlap with the chunk before."""
    after: float = 0.0


def cut(wave: Float[np.ndarray, " S"], *, rate_hz: int, max_s: float | None) -> list[Chunk]:
    """Chunks of at most `max_s` seconds that cover a recording; one if it is no longer than that.

    The last may be shorter than the others, but never than an overlap. None: any length is one.
    """
    longest = len(wave) if max_s is None else int(max_s * rate_hz)
    if len(wave) <= longest:
        return [Chunk(0, len(wave))]
    hop = max(int(FRAME_S * rate_hz), 1)
    power = _power(wave, hop)
    spans = _spans(_smooth(power), hop, len(wave), longest)
    speech = np.cumsum(np.concatenate([[0], _is_speech(power)]))

    def spoken(start: int, end: int) -> int:
        return int(speech[-(-end // hop)] - speech[start // hop])

    chunks = []
    for number, (start, end) in enumerate(spans):
        whole = max(spoken(start, end), 1)
        before = spoken(start, spans[number - 1][1]) if number else 0
        after = spoken(spans[number + 1][0], end) if number + 1 < len(spans) else 0
        chunks.append(Chunk(start, end, before / whole, after / whole))
    return chunks


def _spans(level: np.ndarray, hop: int, samples: int, longest: int) -> list[tuple[int, int]]:
    """Where chunks begin and end, each place the quietest of half an overlap."""
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
    """The quietest sample from `low` to `high`, both in it; the middle of the first stretch."""
    first = low // hop
    window = level[first : high // hop + 1]
    found = np.flatnonzero(window == window.min())
    run = found[: 1 + np.flatnonzero(np.diff(found, append=found[-1] + 2) > 1)[0]]
    place = (first + int(run[len(run) // 2])) * hop + hop // 2
    return min(max(place, low), high)


def _power(wave: np.ndarray, hop: int) -> np.ndarray:
    """Mean square of each frame of `hop` samples; the last may be shorter."""
    whole = len(wave) // hop
    frames = wave[: whole * hop].reshape(whole, hop)
    rest = wave[whole * hop :]
    power = np.einsum("fs,fs->f", frames, frames) / hop
    return np.append(power, float(rest @ rest) / len(rest)) if len(rest) else power


def _smooth(power: np.ndarray) -> np.ndarray:
    """Mean over QUIET_FRAMES frames around each."""
    half = QUIET_FRAMES // 2
    padded = np.pad(power, (half + 1, half), mode="edge").astype(np.float64)
    sums = np.cumsum(padded)
    return np.maximum(sums[2 * half + 1 :] - sums[: -2 * half - 1], 0) / (2 * half + 1)


def _is_speech(power: np.ndarray) -> np.ndarray:
    """Bool per frame: as loud as speech is, by the loudest twentieth of the recording."""
    return power > SPEECH_LEVEL * np.quantile(power, 0.95)
