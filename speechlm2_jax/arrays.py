"""Types of arrays that every package uses."""

from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
else:
    ArrayLike = object  # checked at run time, NumPy's type would refuse an int and a list of them

__all__ = ["AnyArray", "ArrayLike", "Scalar", "Size"]

AnyArray = jax.Array | np.ndarray
"""An array on the devices (or a tracer), or on the host."""
Scalar = AnyArray | np.number | float | int
"""An array of rank 0, or a number."""
Size = TypeVar("Size", int, jax.Array, np.ndarray)
"""One number of elements, or an array of them."""
