"""The most rows whose program fits into memory, found with few compilations."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MOST_COMPILATIONS = 7
"""Of one bin."""
CLOSE = 0.02
"""A program is not compiled again for so small a share of more rows."""
STEP_BACK = 0.05
"""So many fewer rows are tried where the compiler found no room."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The most rows of a bin, and what was compiled to find them."""

    rows: int
    """0 if not even one fits."""
    sizes: Mapping[int, float]
    """Rows -> bytes of the program; infinite where the compiler found no room."""

    @property
    def memory_bytes(self) -> float:
        """Of the program with these rows; if not even one fits, of that with one."""
        return self.sizes[max(self.rows, 1)]


def most_rows(
    memory_of: Callable[[int], float],
    limit_bytes: float,
    *,
    most: int,
    guess: int | None = None,
    base_bytes: float | None = None,
) -> Fit:
    """Finds the most rows, at most `most`, whose program needs at most `limit_bytes`.

    `memory_of` compiles the program of so many rows. Memory is close to affine in rows. So two
    programs, of one row and two, give a line, and a third checks the rows that the line gives.
    Other bins tell a first `guess` and `base_bytes`, the memory without any row, in place of the
    first two. Only if the rows miss by more than CLOSE is another compiled. The result was always
    compiled.
    """
    known = {} if base_bytes is None or base_bytes >= limit_bytes else {0: base_bytes}
    sizes: dict[int, float] = {}
    rows = min(max(guess or 1, 1), most) if known else 1
    while rows not in sizes and len(sizes) < MOST_COMPILATIONS:
        sizes[rows] = memory_of(rows)
        rows = _next({**known, **sizes}, limit_bytes, most)
    if not (fitting := _fitting(sizes, limit_bytes)):
        if 1 not in sizes:
            sizes[1] = memory_of(1)
        fitting = _fitting(sizes, limit_bytes)
    return Fit(rows=max(fitting, default=0), sizes=sizes)


def base_of(sizes: Mapping[int, float]) -> float | None:
    """The memory without any row, by the line through the smallest and the largest program."""
    finite = sorted(rows for rows, size in sizes.items() if math.isfinite(size))
    if len(finite) < 2:
        return None
    low, high = finite[0], finite[-1]
    return sizes[low] - low * (sizes[high] - sizes[low]) / (high - low)


def _fitting(sizes: Mapping[int, float], limit_bytes: float) -> list[int]:
    return [rows for rows, size in sizes.items() if size <= limit_bytes]


def _next(sizes: Mapping[int, float], limit_bytes: float, most: int) -> int:
    """The rows that a line through two programs gives; compiled ones: they are found."""
    low = max(_fitting(sizes, limit_bytes), default=0)
    high = min((rows for rows, size in sizes.items() if size > limit_bytes), default=most + 1)
    if high <= 1 or low >= most:
        return max(low, 1)
    is_known = math.isfinite(sizes.get(high, math.inf))
    other = high if is_known else max((rows for rows in sizes if rows < low), default=low)
    slope = (sizes[other] - sizes[low]) / (other - low) if other != low else 0.0
    if slope <= 0:
        return max(min(2 * low, high - 1), 1)
    rows = min(low + int((limit_bytes - sizes[low]) / slope), most)
    if rows >= high:
        rows = high - 1 if is_known else _stepped_back(sizes, low, high)
    return max(low if rows <= low * (1 + CLOSE) else rows, 1)


def _stepped_back(sizes: Mapping[int, float], low: int, high: int) -> int:
    """Fewer rows than the `high` that the compiler found no room for: 5 % less, then 10 %, ..."""
    failed = sum(math.isinf(size) for size in sizes.values())
    return max(int(high * (1 - STEP_BACK * 2 ** (failed - 1))), (low + high) // 2)
