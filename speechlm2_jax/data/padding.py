"""Sequences of unequal length as one array, padded on the right or on the left."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Shaped


def pad_right(
    sequences: Sequence[np.ndarray | list[int]],
    value: int = 0,
    *,
    dtype: type = np.float32,
    rows: int | None = None,
    width: int | None = None,
) -> tuple[Shaped[np.ndarray, "B T"], Int32[np.ndarray, " B"]]:
    """Stacks sequences [T], filled up with `value`, and gives their lengths.

    `rows` and `width` make the batch larger: further rows have length 0.
    """
    lengths = np.zeros(len(sequences) if rows is None else rows, np.int32)
    lengths[: len(sequences)] = [len(sequence) for sequence in sequences]
    width = int(lengths.max(initial=0)) if width is None else width
    padded = np.full((len(lengths), width), value, dtype)
    for row, sequence in zip(padded, sequences, strict=False):
        row[: len(sequence)] = sequence
    return padded, lengths


def pad_left(
    sequences: Sequence[np.ndarray], value: int, *, dtype: type = np.int32
) -> Shaped[np.ndarray, "B T"]:
    """Stacks sequences [T], with `value` before each, as NeMo's collation does."""
    padded = np.full((len(sequences), max(map(len, sequences), default=0)), value, dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        row[len(row) - len(sequence) :] = sequence
    return padded
