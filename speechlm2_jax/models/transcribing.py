"""Recordings in, texts out: what every recogniser does around its network."""

from collections.abc import Callable, Sequence

import numpy as np

from speechlm2_jax.models.shapes import SAMPLE_STEP, round_up

ROWS_AT_ONCE = 16
Decode = Callable[[np.ndarray, np.ndarray], list[list[int]]]
"""Audio float32 [B, S] and lengths int32 [B] -> the labels of each row."""


def transcribe(
    waves: Sequence[np.ndarray], decode: Decode, spell: Callable[[list[int]], str]
) -> list[str]:
    """Writes down recordings float32 [S], in input order.

    Recordings of like length go together, in few static shapes: two sizes per doubling of rows
    and of seconds.
    """
    order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
    texts = [""] * len(waves)
    for start in range(0, len(order), ROWS_AT_ONCE):
        chosen = order[start : start + ROWS_AT_ONCE]
        labels = decode(*_padded([waves[i] for i in chosen]))
        for i, row in zip(chosen, labels, strict=False):  # rows beyond them are filling
            texts[i] = spell(row)
    return texts


def _padded(waves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    samples = round_up(max(map(len, waves)), SAMPLE_STEP)
    audio = np.zeros((round_up(len(waves), 1), samples), np.float32)
    lengths = np.zeros(len(audio), np.int32)
    for row, wave in enumerate(waves):
        audio[row, : len(wave)], lengths[row] = wave, len(wave)
    return audio, lengths
