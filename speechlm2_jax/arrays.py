"""Types of arrays that every package uses."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array on the devices (or a tracer), or on the host."""
Scalar = AnyArray | np.number | float
"""An array of rank 0, or a number."""
