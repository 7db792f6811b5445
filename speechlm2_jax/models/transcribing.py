"""Recordings in, texts out: what every recogniser does around its network."""

from collections.abc import Callable, Sequence

import numpy as np

from speechlm2_jax.asr.text import attach_punctuation, punctuation_marks
from speechlm2_jax.data.tokenizer import Tokenizer
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


class Speller:
    """Labels -> text, as NeMo spells it."""

    def __init__(self, tokenizer: Tokenizer, pieces: int) -> None:
        self._tokenizer = tokenizer
        self._marks = punctuation_marks(tokenizer.ids_to_tokens(range(pieces)))

    def __call__(self, labels: list[int]) -> str:
        """Joins pieces; an unknown one stays visible."""
        text = self._tokenizer.ids_to_text(labels, remove_special_tokens=False)
        return attach_punctuation(text, self._marks)


def _padded(waves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    samples = round_up(max(map(len, waves)), SAMPLE_STEP)
    audio = np.zeros((round_up(len(waves), 1), samples), np.float32)
    lengths = np.zeros(len(audio), np.int32)
    for row, wave in enumerate(waves):
        audio[row, : len(wave)], lengths[row] = wave, len(wave)
    return audio, lengths
