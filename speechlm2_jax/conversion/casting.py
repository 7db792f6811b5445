"""Floating tensors in another dtype, as checkpoints are handed on in half the bytes."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from speechlm2_jax.conversion.errors import ConversionError

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def cast(tensors: Mapping[str, np.ndarray], dtype: str | None) -> dict[str, np.ndarray]:
    """Every floating tensor in `dtype`, rounded to nearest; integers and None change nothing.

    Raises ConversionError for another dtype, and for finite values that become infinite.
    """
    if dtype is None:
        return dict(tensors)
    if dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not supported; use {', '.join(DTYPES)}")
    return {name: _cast(name, value, DTYPES[dtype]) for name, value in tensors.items()}


def _cast(name: str, value: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if value.dtype.kind in "biuc" or value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        made = value.astype(dtype)
    if np.isinf(made.astype(np.float32)).sum() > np.isinf(value.astype(np.float64)).sum():
        largest = np.abs(value[np.isfinite(value)]).max()
        raise ConversionError(
            f"{name} has values beyond {dtype}, the largest {largest:g}; use bfloat16 or float32"
        )
    return made
