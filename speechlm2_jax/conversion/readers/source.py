"""What every reader gives: named tensors that are read when asked for, whole or by slices."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

Index = tuple[slice, ...]
"""One slice per dimension."""
MAX_RANK = 16
MAX_TENSOR_BYTES = 1 << 48


def extent(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the part that `index` names."""
    return tuple(len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True))


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def size_bytes(self) -> int:
        """The bytes that the values take."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def is_plausible(self) -> bool:
        """False for shapes that no array can have, such as (0, 2**62)."""
        count = math.prod(n for n in self.shape if n)
        return len(self.shape) <= MAX_RANK and count * self.dtype.itemsize <= MAX_TENSOR_BYTES


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors of one checkpoint."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor that is stored, by its foreign name."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names -> the stored name; from the metadata of safetensors files."""
        ...

    @property
    def where(self) -> str:
        """The file or directory; "" for arrays in memory."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads one tensor, or the part that `index` names."""
        ...

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor into a contiguous array of its shape and dtype."""
        ...


@dataclass(frozen=True)
class LazySource:
    """Tensors whose values one function fetches."""

    infos: Mapping[str, TensorInfo]
    fetch: Callable[[str, Index | None], np.ndarray]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    where: str = ""
    fetch_into: Callable[[str, np.ndarray], None] | None = None
    """Reads a whole tensor into an array, without a copy in between."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Reads one tensor, or the part that `index` names; slices end where the tensor ends."""
        if index is None:
            return self.fetch(name, None)
        shape = self.infos[name].shape
        inside = (slice(*part.indices(n)) for part, n in zip(index, shape, strict=True))
        return self.fetch(name, tuple(inside))

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor into a contiguous array of its shape and dtype."""
        if self.fetch_into is None:
            out[...] = self.read(name)
        else:
            self.fetch_into(name, out)


ALIGNMENT_BYTES = 64
"""JAX takes host memory that is aligned so without a copy."""


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
    """An array without values that JAX can take over."""
    size = TensorInfo(shape, dtype).size_bytes
    whole = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT_BYTES
    return whole[start : start + size].view(dtype).reshape(shape)


def memory_source(
    tensors: Mapping[str, np.ndarray], aliases: Mapping[str, str] | None = None
) -> LazySource:
    """Makes a source of arrays that are in memory already."""

    def fetch(name: str, index: Index | None) -> np.ndarray:
        return tensors[name] if index is None else np.asarray(tensors[name][index])

    infos = {name: TensorInfo(x.shape, x.dtype) for name, x in tensors.items()}
    return LazySource(infos, fetch, dict(aliases or {}))
