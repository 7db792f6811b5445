"""Examples in groups: one for each data-parallel shard."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


def split_evenly(examples: Sequence[Any] | np.ndarray, groups: int) -> list[Any]:
    """Splits examples into `groups` consecutive parts whose sizes differ by at most one."""
    bounds = np.linspace(0, len(examples), groups + 1).round().astype(int)
    return [examples[a:b] for a, b in itertools.pairwise(bounds)]
