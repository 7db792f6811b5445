"""Lengths of the rows of large data, by whole columns, and what settings leave out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from speechlm2_jax.data.bucketing import Measures
from speechlm2_jax.data.index.row_columns import SKIPPED

KEPT, NOT_A_ROW = 0, 255
"""What `LengthsOfRows.cause` may be beside the number of a cause."""


@dataclass(frozen=True, kw_only=True)
class LengthsOfRows:
    """Lengths of consecutive rows."""

    measures: Measures
    causes: Sequence[str]
    """Why settings may leave rows out; the first that holds counts."""
    cause: Int[np.ndarray, " n"]
    """Of a row the number of the cause, from 1; KEPT or NOT_A_ROW."""
    seconds: Float[np.ndarray, " n"]
    """Of the longest recording."""
    tokens: Int[np.ndarray, " n"]
    """Of the text; 0 where lengths are seconds."""


def first_causes(
    causes: Sequence[str],
    is_left_out: Mapping[str, Bool[np.ndarray, " n"]],
    flags: Int[np.ndarray, " n"],
) -> Int[np.ndarray, " n"]:
    """Of each row the number of the first cause that leaves it out (`LengthsOfRows.cause`).

    Args:
        causes: their names, in order.
        is_left_out: by cause; one without rows may be missing.
        flags: the column of rows.
    """
    cause = np.full(len(flags), KEPT, np.uint8)
    for number in range(len(causes), 0, -1):
        if (mask := is_left_out.get(causes[number - 1])) is not None:
            cause[mask] = number
    cause[flags & SKIPPED > 0] = NOT_A_ROW
    return cause


def samples_of(duration_s: Float[np.ndarray, " n"], rate_hz: int) -> Int[np.ndarray, " n"]:
    """`AudioClip.samples` of many."""
    return np.floor(np.round(duration_s * rate_hz, 6) + 0.5).astype(np.int64)
