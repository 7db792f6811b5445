"""Rows that are far longer than all else of their set: one wrong row would decide every shape."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Real

from speechlm2_jax.data.conversations import AnyConversation

FACTOR = 20
"""So many times the usual longest length is too long,"""
USUAL = 0.99
"""which is this quantile of the other rows."""
FLOORS = {"seconds": 60.0, "tokens": 1000.0}
"""Lengths up to these never are: they harm nothing."""
FAR = "_far_too_many"
"""Behind the unit of a length: why such rows are left out."""
_SET_ASIDE = 2
"""The longest rows, which the usual length must not come from; one of less than 8 rows."""


def far_out(lengths: Real[np.ndarray, " N"], unit: str) -> tuple[Bool[np.ndarray, " N"], float]:
    """Which lengths are more than FACTOR times the usual, and the usual; 0 counts as no length.

    The usual length is the 99th percentile of all but the longest two (of less than 8 rows: of all
    but the longest), so that a wrong row of a small set is not its own measure. Of less than three
    rows none is told apart.
    """
    rows = np.sort(lengths[lengths > 0])
    if len(rows) < 3:
        return np.zeros(len(lengths), bool), 0.0
    others = rows[: -_SET_ASIDE if len(rows) >= 4 * _SET_ASIDE else -1]
    usual = float(np.quantile(others, USUAL, method="higher"))
    return lengths > max(FACTOR * usual, FLOORS[unit]), usual


def find_outliers(
    lengths: Mapping[str, Real[np.ndarray, " N"]],
    keep: Bool[np.ndarray, " N"],
    conversations: Sequence[AnyConversation],
) -> dict[str, dict[int, str]]:
    """By unit: the rows that are too long among those kept, and what to say of each.

    Args:
        lengths: seconds or tokens of each row, by unit.
        keep: rows that settings let pass.
        conversations: the rows, which have an `id` and a `where`.
    """
    found: dict[str, dict[int, str]] = {}
    for unit, values in lengths.items():
        is_far, usual = far_out(np.where(keep, values, 0), unit)
        for index in np.flatnonzero(is_far).tolist():
            one, length = conversations[index], values[index].item()
            found.setdefault(unit, {})[index] = (
                f"{one.id} ({one.where}: {length:,.10g} {unit}, of the others 99 % have at most "
                f"{usual:,.6g})"
            )
    return found
