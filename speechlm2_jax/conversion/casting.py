"""Floating tensors in another dtype, as checkpoints are handed on in half the bytes."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.source import Index, LazySource, TensorInfo, TensorSource

DTYPES: Mapping[str, np.dtype[np.generic]] = {
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
    made = dtype_named(dtype)
    return {name: _cast(name, value, made) for name, value in tensors.items()}


def cast_source(source: TensorSource, dtype: str | None) -> TensorSource:
    """The same tensors as `cast` gives, each cast when it is read. Raises as `cast` does."""
    if dtype is None:
        return source
    made = dtype_named(dtype)
    infos = {
        name: TensorInfo(info.shape, made if _is_cast(info.dtype) else info.dtype)
        for name, info in source.infos.items()
    }

    def fetch(name: str, index: Index | None) -> np.ndarray:
        return _cast(name, source.read(name, index), made)

    return LazySource(infos, fetch, source.aliases, source.where)


def main_dtype(source: TensorSource) -> str:
    """The floating dtype that holds most bytes."""
    sizes: dict[str, int] = {}
    for info in source.infos.values():
        if _is_cast(info.dtype):
            sizes[info.dtype.name] = sizes.get(info.dtype.name, 0) + info.size_bytes
    return max(sizes, key=lambda name: sizes[name])


def dtype_named(name: str) -> np.dtype[np.generic]:
    """The dtype of a name in `DTYPES`. Raises ConversionError for another name."""
    if name not in DTYPES:
        raise ConversionError(f"dtype {name!r} is not supported; use {', '.join(DTYPES)}")
    return DTYPES[name]


def _is_cast(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind not in "biuc"


def _cast(name: str, value: np.ndarray, dtype: np.dtype[np.generic]) -> np.ndarray:
    if not _is_cast(value.dtype) or value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        made = value.astype(dtype)
    if np.isinf(made.astype(np.float32)).sum() > np.isinf(value.astype(np.float64)).sum():
        largest = np.abs(value[np.isfinite(value)]).max()
        raise ConversionError(
            f"{name} has values beyond {dtype}, the largest {largest:g}; use bfloat16 or float32"
        )
    return made
