"""Bins estimated from the lengths of a data set: by one length, or by input and output."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Real

from speechlm2_jax.data.bucketing import Measures, equal_mass_edges, least_padding_edges
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.data.index.salm import IndexedSalmContents
from speechlm2_jax.data.prepare import Prepared
from speechlm2_jax.settings import SettingsError

DECIMALS = 2
"""Of bins in seconds."""
Bin = int | float | list[int]
"""The longest length of a bin, or the longest input and output."""


def estimate(prepared: Prepared, count: int, multiple: int) -> list[Bin]:
    """At most `count` bins that leave the least padding; the last one holds the longest.

    `prepared` is planned with `count` buckets: those of a large data set are the bins.
    """
    contents: Any = prepared.contents
    if isinstance(contents, IndexedContents):
        plan = prepared.sampler.plan
        return [_rounded(members.longest) for members in plan.members]
    measures: Measures = contents.measures
    length = np.sort(measures.length)
    edges = least_padding_edges(measures, prepared.config.sample_rate, multiple, count)
    # an edge is drawn back to the longest that it holds
    places = np.searchsorted(length, [*edges.tolist(), np.inf], side="right")
    return _rising([_rounded(length[place - 1].item()) for place in places.tolist() if place])


def estimate_2d(prepared: Prepared, inputs: int, outputs: int) -> list[Bin]:
    """NeMo's 2-D bins: `inputs` lengths of equal mass, and for each `outputs` lengths.

    The last bin of each input length holds the longest output. Raises SettingsError for data that
    has no prompts.
    """
    if not prepared.config.COUNTS_TOKENS:
        raise SettingsError("--buckets-2d needs prompts, which duplex data has not; give --buckets")
    contents: Any = prepared.contents
    if isinstance(contents, IndexedSalmContents):
        longest_in, totals = contents.token_lengths()
        return pairs(longest_in, totals - longest_in, inputs, outputs)
    lengths = [conversation.lengths for conversation in contents.conversations]
    longest_in = np.asarray([one.input_tokens for one in lengths], np.int64)
    longest_out = np.asarray([one.output_tokens for one in lengths], np.int64)
    return pairs(longest_in, longest_out, inputs, outputs)


def pairs(
    inputs: Int[np.ndarray, " N"], outputs: Int[np.ndarray, " N"], count_in: int, count_out: int
) -> list[Bin]:
    """`[[input, output], ...]`, rising; each holds at least one of the lengths given."""
    inputs, outputs = np.maximum(inputs, 1), np.maximum(outputs, 1)
    edges = _with_longest(inputs, count_in)
    group = np.searchsorted(edges, inputs, side="left")
    return [
        [longest, own]
        for number, longest in enumerate(edges)
        for own in _with_longest(outputs[group == number], count_out)
    ]


def _with_longest(length: Int[np.ndarray, " N"], count: int) -> list[int]:
    """At most `count` edges of equal mass; the last one is the longest of the lengths."""
    edges = equal_mass_edges(length, count).astype(int)[: count - 1]
    return sorted({*edges.tolist(), int(length.max())})


def _rising(bins: Sequence[Bin]) -> list[Bin]:
    return list(dict.fromkeys(bins))  # pyright: ignore[reportArgumentType]


def _rounded(length: Real) -> int | float:
    """Whole tokens, or seconds rounded up."""
    if isinstance(length, int):
        return max(length, 1)
    return math.ceil(round(length * 10**DECIMALS, 6)) / 10**DECIMALS
