"""Cuts long recordings at pauses into parts that follow each other, and finds parts without speech.

A part begins with speech and ends in the first pause that is as long as those between sentences,
so that it holds what models are trained on. Without such a pause it ends in the longest one; where
nobody pauses, at the quietest place.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

FRAME_S = 0.01
LOUD_SHARE = 1e-3
"""A frame is loud if its power is above this share (-30 dB) of the 95th percentile, ..."""
ABOVE_NOISE = 4.0
"""... and above this multiple (6 dB) of the 10th percentile, the noise between words, ..."""
SPEECH_SHARE = 0.1
"""... or above this share of the 95th percentile, in any noise."""
NOTHING = 1e-8
"""Power of silence (-80 dB of full scale): nothing below it is speech."""
MIN_PAUSE_S = 0.25
"""Shorter silences lie within words and between those of a phrase."""
SENTENCE_PAUSE_S = 0.35
"""Pauses from here on lie between sentences: the first ends a part that holds LEAST_SHARE."""
LEAST_SHARE = 0.2
"""A part holds at least this share of the longest part, if a pause does not end the recording."""
MARGIN_S = 0.1
"""Silence that is kept before and after the speech of a part.

With 0.02 s and with 0.3 s the bundled encoder has half as many errors again: 0.3 s of digital
silence move its normalised features.
"""
REST_S = 0.5
"""The last part is not shorter."""
SHORTEST_S = 0.05
"""Loud frames of a part with speech, in seconds: less is a click."""
QUIET_FRAMES = 15
"""Frames over which loudness is averaged to find a quiet place without a pause: 150 ms."""


class Stretch(NamedTuple):
    """A stretch of a recording, in samples."""

    start: int
    end: int
    has_speech: bool = True
    """Whether anything in it is loud enough for speech."""


def cut_at_pauses(
    wave: Float[np.ndarray, " S"], *, rate_hz: int, max_s: float | None
) -> list[Stretch]:
    """Cuts a recording into parts of at most `max_s` seconds (None: one part).

    They do not overlap, and leave out the silence at their edges beyond MARGIN_S. A recording
    that is not longer than `max_s` is one part, whole; parts of a longer one all have speech.
    """
    hop = max(round(FRAME_S * rate_hz), 1)
    longest = len(wave) if max_s is None else int(max_s * rate_hz)
    power = frame_power(wave, hop)
    is_loud = loud_frames(power)
    if len(wave) <= longest:
        return [Stretch(0, len(wave), _has_speech(is_loud))]
    bounds = _bounds(power, is_loud, longest // hop)
    parts = [_trimmed(is_loud, start, end, hop, len(wave)) for start, end in bounds]
    return [part for part in parts if part.has_speech]


def frame_power(wave: Float[np.ndarray, " S"], hop: int) -> Float[np.ndarray, " F"]:
    """Mean square of each frame of `hop` samples; the last frame may be shorter."""
    whole = len(wave) // hop
    frames = wave[: whole * hop].reshape(whole, hop)
    power = np.einsum("fs,fs->f", frames, frames) / hop
    rest = wave[whole * hop :]
    return np.append(power, float(rest @ rest) / len(rest)) if len(rest) else power


def loud_frames(power: Float[np.ndarray, " F"]) -> Bool[np.ndarray, " F"]:
    """Whether each frame is loud enough for speech, by the loudness of the whole recording."""
    if not len(power):
        return np.zeros(0, bool)
    speech, noise = np.quantile(power, 0.95), np.quantile(power, 0.1)
    level = min(max(LOUD_SHARE * speech, ABOVE_NOISE * noise), SPEECH_SHARE * speech)
    return power > max(level, NOTHING)


def _bounds(power: np.ndarray, is_loud: np.ndarray, most: int) -> list[tuple[int, int]]:
    """First frame, and frame after the last, of parts of at most `most` frames."""
    pauses, bounds, start = _pauses(is_loud), list[tuple[int, int]](), 0
    level = np.convolve(power, np.ones(QUIET_FRAMES) / QUIET_FRAMES, mode="same")
    loud = np.flatnonzero(is_loud)
    while (n := int(np.searchsorted(loud, start))) < len(loud):
        start = max(start, int(loud[n]) - round(MARGIN_S / FRAME_S))
        end = _end(pauses, level, start, most)
        bounds.append((start, end))
        start = end
    return bounds


def _end(pauses: list[tuple[int, int]], level: np.ndarray, start: int, most: int) -> int:
    """Where a part that begins at frame `start` ends.

    In the first pause between sentences, else with the recording if it may hold the rest, else in
    the longest pause, else in the quietest place.
    """
    low = start + max(int(LEAST_SHARE * most), 1)
    high = min(start + most, max(len(level) - round(REST_S / FRAME_S), low + 1))
    own = [(b - a, a, b) for a, b in pauses if a < high and b > low]
    between = [pause for pause in own if pause[0] * FRAME_S >= SENTENCE_PAUSE_S]
    if not between and len(level) - start <= most:
        return len(level)
    if not own:
        return low + int(level[low:high].argmin())
    _, a, b = between[0] if between else max(own)
    return min(max((a + b) // 2, low), high)


def _pauses(is_loud: np.ndarray) -> list[tuple[int, int]]:
    """First frame, and frame after the last, of each silence of at least MIN_PAUSE_S."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], is_loud.astype(np.int8), [1]])))
    runs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return [(a, b) for a, b in runs if (b - a) * FRAME_S >= MIN_PAUSE_S]


def _trimmed(is_loud: np.ndarray, start: int, end: int, hop: int, samples: int) -> Stretch:
    """Frames [start, end) without the silence at their edges beyond MARGIN_S, in samples."""
    own = is_loud[start:end]
    if not _has_speech(own):
        return Stretch(start * hop, min(end * hop, samples), False)
    loud = np.flatnonzero(own)
    margin = round(MARGIN_S / FRAME_S)
    first, last = max(int(loud[0]) - margin, 0), min(int(loud[-1]) + 1 + margin, len(own))
    return Stretch((start + first) * hop, min((start + last) * hop, samples))


def _has_speech(is_loud: np.ndarray) -> bool:
    return bool(is_loud.sum() * FRAME_S >= SHORTEST_S)
