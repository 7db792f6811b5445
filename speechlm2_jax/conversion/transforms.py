"""Named, invertible ways in which a foreign tensor becomes ours.

Each knows the shape it gives and where a part of ours lies in the foreign tensor, so that a host
reads only what its devices hold.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.conversion.readers.source import Index, TensorInfo

Shape = tuple[int, ...]


@runtime_checkable
class Transform(Protocol):
    """A bijection between a foreign tensor and ours."""

    def info(self, foreign: TensorInfo) -> TensorInfo:
        """Gives our shape and dtype. Raises ValueError if the foreign tensor cannot be meant."""
        ...

    def index(self, index: Index) -> Index:
        """Tells where the part `index` of ours lies in the foreign tensor."""
        ...

    def load(self, foreign: np.ndarray) -> np.ndarray:
        """Turns (a part of) the foreign tensor into ours."""
        ...

    def store(self, ours: np.ndarray) -> np.ndarray:
        """Turns ours into the foreign tensor; the inverse of `load`, bit for bit."""
        ...


@dataclass(frozen=True)
class Identity:
    """The same tensor."""

    def info(self, foreign: TensorInfo) -> TensorInfo:
        """Gives the same shape and dtype."""
        return foreign

    def index(self, index: Index) -> Index:
        """Gives the same place."""
        return index

    def load(self, foreign: np.ndarray) -> np.ndarray:
        """Returns its argument."""
        return foreign

    def store(self, ours: np.ndarray) -> np.ndarray:
        """Returns its argument."""
        return ours


@dataclass(frozen=True)
class Squeeze:
    """Drops axes of size 1: the taps of pointwise convolutions, the input channel of depthwise."""

    axes: tuple[int, ...]
    """Axes of the foreign tensor, in rising order."""

    def info(self, foreign: TensorInfo) -> TensorInfo:
        """Drops the axes. Raises ValueError if one is missing or longer than 1."""
        shape = foreign.shape
        if any(axis >= len(shape) or shape[axis] != 1 for axis in self.axes):
            raise ValueError(f"axes {self.axes} of shape {shape} should have size 1")
        kept = tuple(n for axis, n in enumerate(shape) if axis not in self.axes)
        return TensorInfo(kept, foreign.dtype)

    def index(self, index: Index) -> Index:
        """Takes the dropped axes whole."""
        parts = list(index)
        for axis in self.axes:
            parts.insert(axis, slice(0, 1))
        return tuple(parts)

    def load(self, foreign: np.ndarray) -> np.ndarray:
        """Drops the axes."""
        return np.squeeze(foreign, self.axes)

    def store(self, ours: np.ndarray) -> np.ndarray:
        """Puts the axes back."""
        return np.expand_dims(ours, self.axes)


@dataclass(frozen=True)
class Permute:
    """Orders the axes otherwise: a convolution's taps before its inputs."""

    axes: tuple[int, ...]
    """Which foreign axis each of ours is."""

    def info(self, foreign: TensorInfo) -> TensorInfo:
        """Orders the shape. Raises ValueError for another number of axes."""
        if len(foreign.shape) != len(self.axes):
            raise ValueError(f"shape {foreign.shape} should have {len(self.axes)} axes")
        return TensorInfo(tuple(foreign.shape[axis] for axis in self.axes), foreign.dtype)

    def index(self, index: Index) -> Index:
        """Orders the slices back."""
        return tuple(index[self.axes.index(axis)] for axis in range(len(self.axes)))

    def load(self, foreign: np.ndarray) -> np.ndarray:
        """Orders the axes."""
        return np.ascontiguousarray(foreign.transpose(self.axes))

    def store(self, ours: np.ndarray) -> np.ndarray:
        """Orders the axes back."""
        return np.ascontiguousarray(ours.transpose(np.argsort(self.axes)))


@dataclass(frozen=True)
class Recount:
    """Another width of integers: torch counts in int64, JAX by default in int32."""

    foreign: str = "int64"
    ours: str = "int32"

    def info(self, foreign: TensorInfo) -> TensorInfo:
        """Gives our dtype. Raises ValueError for another foreign dtype than the declared."""
        if foreign.dtype != np.dtype(self.foreign):
            raise ValueError(f"dtype {foreign.dtype} should be {self.foreign}")
        return TensorInfo(foreign.shape, np.dtype(self.ours))

    def index(self, index: Index) -> Index:
        """Gives the same place."""
        return index

    def load(self, foreign: np.ndarray) -> np.ndarray:
        """Converts. Raises ValueError if a number does not fit."""
        return _exactly(foreign, self.ours)

    def store(self, ours: np.ndarray) -> np.ndarray:
        """Converts back."""
        return _exactly(ours, self.foreign)


def _exactly(x: np.ndarray, dtype: str) -> np.ndarray:
    limits: Any = np.iinfo(dtype)
    if x.size and not (limits.min <= x.min() and x.max() <= limits.max):
        raise ValueError(f"a counter of {x.max()} does not fit {dtype}")
    return x.astype(dtype)


IDENTITY = Identity()
