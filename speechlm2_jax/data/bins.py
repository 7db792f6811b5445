"""Two-dimensional bins: `bucket_duration_bins` of [input, output] lengths, NeMo's 2-D bucketing."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.config import DataLoaderConfig


def bin_of(
    config: DataLoaderConfig, inputs: Int[np.ndarray, " N"], outputs: Int[np.ndarray, " N"]
) -> Int[np.ndarray, " N"]:
    """The bin of each conversation by its input and output tokens; the number of bins if none fits.

    The rules are those of NeMo's `find_smallest_bucket`. With `bucketing_2d_strict_mode` the first
    input length that is long enough decides, and among its bins the first output length; a list
    `max_tpt` also limits the output tokens per input token of each bin. Otherwise the first bin
    counts that holds both.
    """
    bins = np.asarray(config.bucket_duration_bins)
    if not config.bucketing_2d_strict_mode:
        fits = (inputs[:, None] <= bins[:, 0]) & (outputs[:, None] <= bins[:, 1])
        return np.where(fits.any(axis=1), fits.argmax(axis=1), len(bins))
    firsts, begins = np.unique(bins[:, 0], return_index=True)
    ends = [*begins[1:].tolist(), len(bins)]
    group = np.searchsorted(firsts, inputs, side="left")
    found = np.full(len(inputs), len(bins))
    for number, (begin, end) in enumerate(zip(begins.tolist(), ends, strict=True)):
        own = np.flatnonzero(group == number)
        place = begin + np.searchsorted(bins[begin:end, 1], outputs[own], side="left")
        found[own] = np.where(place < end, place, len(bins))
    return _within(config.max_tpt, found, inputs, outputs)


def _within(
    ratios: float | Sequence[float], found: np.ndarray, inputs: np.ndarray, outputs: np.ndarray
) -> np.ndarray:
    """Without the conversations whose output is too long for their input, where bins limit it."""
    if isinstance(ratios, float | int):
        return found
    most = np.asarray([*ratios, np.inf])[found]
    return np.where(outputs / np.maximum(inputs, 1) > most, len(ratios), found)
