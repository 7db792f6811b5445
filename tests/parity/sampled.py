"""Large recorded tensors, of which the files in tests/data keep a sample of all positions."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

STRIDE = 13
"""No last axis that is sampled is a multiple of it, so that every row and column is met."""


class Sample(NamedTuple):
    """Every 13th element in C order, and each row's root of the mean square of its elements."""

    values: np.ndarray
    rms: np.ndarray


def sampled(tensor: np.ndarray) -> Sample:
    """What is recorded of a large tensor."""
    rows = tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor[None]
    rms = np.sqrt(np.square(rows, dtype=np.float64).mean(axis=1)).astype(np.float32)
    return Sample(np.ascontiguousarray(tensor.ravel()[::STRIDE]), rms)


def recorded_names(recorded: Mapping[str, np.ndarray], prefix: str) -> list[str]:
    """The tensors whose names begin with `prefix`, whole or sampled."""
    return sorted({name.split(":")[0] for name in recorded if name.startswith(prefix)})


def assert_recorded(
    actual: np.ndarray,
    recorded: Mapping[str, np.ndarray],
    name: str,
    *,
    atol: float,
    rtol: float = 1e-7,
) -> None:
    """Compares a tensor with `name` among the recorded ones: all of it, or its sample and rms."""
    actual = np.asarray(actual)
    pairs = {name: actual}
    if name not in recorded:
        assert actual.shape[-1] % STRIDE
        sample = sampled(actual)
        pairs = {f"{name}:sample": sample.values, f"{name}:rms": sample.rms}
    for key, own in pairs.items():
        np.testing.assert_allclose(own, recorded[key], atol=atol, rtol=rtol, err_msg=key)
