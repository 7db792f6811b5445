"""Types of arrays that every package uses."""

from typing import TypeVar

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array on the devices (or a tracer), or on the host."""
Scalar = AnyArray | np.number | float
"""An array of rank 0, or a number."""
Size = TypeVar("Size", int, jax.Array, np.ndarray)
"""One number of elements, or an array of them."""
