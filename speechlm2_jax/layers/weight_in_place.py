"""Matmuls of few rows by weights that are sharded over data-parallel devices: the rows move.

A decoding step has one row for each sequence. Sending the rows to the parts of a weight takes fewer
bytes than gathering the weight on every device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from speechlm2_jax.sharding import BATCH_AXES, Axes, AxisNames, current


class WeightInPlace(NamedTuple):
    """How a matmul of few rows runs while its weight [out, in] stays where it is."""

    rows: tuple[str, ...]
    """Mesh axes that still shard the rows: those that do not shard the weight."""
    out: AxisNames
    into: AxisNames
    """Mesh axes that shard the weight's output and its input."""

    def constrain(self, x: jax.Array, last: AxisNames) -> jax.Array:
        """Constrains activations [rows, ..., width]: each device holds all rows, of its columns."""
        sharding = current()
        assert sharding is not None
        rows = self.rows if x.shape[0] % sharding.size(self.rows) == 0 else ()
        spec = PartitionSpec(rows or None, *[None] * (x.ndim - 2), last)
        return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))


def weight_in_place(axes: Axes, shape: Sequence[int], rows: int) -> WeightInPlace | None:
    """How to multiply `rows` rows by a weight [out, in] without gathering it.

    None if the weight is not sharded over data-parallel devices, or if gathering it moves fewer
    bytes, or outside of inference.
    """
    sharding = current()
    if sharding is None or not sharding.moves_rows:
        return None
    out, into = (
        (entry,) if isinstance(entry, str) else entry for entry in sharding.spec(axes, shape)
    )
    taken = {*(out or ()), *(into or ())}
    left = tuple(axis for axis in BATCH_AXES if axis not in taken)
    is_small = rows * sum(shape) < math.prod(shape) * sharding.size(left)
    return WeightInPlace(left, out, into) if is_small and left != BATCH_AXES else None
