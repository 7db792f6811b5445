"""The batch shape that is compiled ahead of time, by settings alone."""

import math
from collections.abc import Mapping
from typing import Any

from speechlm2_jax.batches import BatchShape
from speechlm2_jax.data.datamodule import TOKENS_MULTIPLE
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.settings import CompileAhead
from speechlm2_jax.training.run.preparation import Setup

LONGEST_TOKENS, LONGEST_S = 1024, 40.0
"""Shape compiled ahead of time if `train_ds` sets no limits."""


def largest_shape(
    train: Mapping[str, Any], asked: CompileAhead, model: SALM, setup: Setup
) -> BatchShape:
    """The largest batch shape that `train_ds` allows, unless the command line sets one."""
    bins: Any = train.get("bucket_duration_bins") or [LONGEST_TOKENS]
    longest: Any = bins[-1] if isinstance(bins[-1], int | float) else sum(bins[-1])
    tokens = asked.tokens or train.get("max_tokens") or longest
    sizes = train.get("bucket_batch_size") or [train.get("batch_size")]
    fitting = int(train.get("batch_tokens") or tokens) // tokens
    rows = asked.rows or (fitting if train.get("batch_tokens") else sizes[-1]) or 1
    seconds = asked.seconds or train.get("max_duration") or LONGEST_S
    multiple = math.lcm(TOKENS_MULTIPLE, setup.sharding.length_multiple)
    return BatchShape(
        sequences=max(rows, 1),
        tokens=-(-tokens // multiple) * multiple,
        clips=max(rows, 1),
        samples=round(seconds * model.sampling_rate),
    )
