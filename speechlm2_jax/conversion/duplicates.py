"""One tensor that a checkpoint stores under several names: all copies must hold the same values."""

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.source import TensorSource

COMPARED_BYTES = 1 << 26


def agreed(source: TensorSource, stored: list[str], hint: str = "") -> str:
    """The first of `stored`, names of one tensor. Raises ConversionError if another one differs.

    Copies agree if they are equal bit for bit, or become so where one is cast to the other's dtype
    (a float32 embedding beside a bfloat16 head). `hint` tells what to do about those that differ.
    """
    first, *others = dict.fromkeys(stored)
    for other in others:
        difference = _difference(source, first, other)
        if difference:
            raise ConversionError(
                f"{first} and {other} are one tensor in this model, but they differ ({difference})"
                + (f"; {hint}" if hint else "")
            )
    return first


def _difference(source: TensorSource, a: str, b: str) -> str:
    """How two tensors differ, "" if they agree. Reads a block of rows at a time."""
    left, right = source.infos[a], source.infos[b]
    if left.shape != right.shape:
        return f"shapes {left.shape} and {right.shape}"
    if left.dtype != right.dtype and "iub" in {left.dtype.kind, right.dtype.kind}:
        return f"dtypes {left.dtype} and {right.dtype}"
    rows = left.shape[0] if left.shape else 1
    step = max(1, rows * COMPARED_BYTES // max(1, left.size_bytes))
    for start in range(0, rows, step):
        part = (slice(start, start + step), *(slice(0, n) for n in left.shape[1:]))
        index = part[: len(left.shape)]
        at = _first_row(source.read(a, index), source.read(b, index))
        if at is not None:
            return f"first in row {start + at} of {rows}"
    return ""


def _first_row(a: np.ndarray, b: np.ndarray) -> int | None:
    """The first row in which two blocks differ, in the dtype in which they agree most."""
    wrong = _differs(a, b.astype(a.dtype, copy=False))
    if a.dtype != b.dtype and wrong.any():
        back = _differs(a.astype(b.dtype, copy=False), b)
        wrong = back if back.sum() < wrong.sum() else wrong
    return int(np.argmax(wrong)) if wrong.any() else None


def _differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether each row of two blocks of one dtype differs in any bit."""
    rows = a.shape[0] if a.ndim else 1
    if a.size == 0:
        return np.zeros(rows, bool)
    left, right = (np.ascontiguousarray(x).reshape(rows, -1).view(np.uint8) for x in (a, b))
    return (left != right).any(axis=1)
