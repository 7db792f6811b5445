"""The training data of a run, planned with other bins than its settings have."""

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from speechlm2_jax import experiment
from speechlm2_jax.batches import HostBatch
from speechlm2_jax.data import plan_report
from speechlm2_jax.data.bucketing import Members, Shape
from speechlm2_jax.data.datamodule import TOKENS_MULTIPLE, TRAIN, DataModule
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.data.prepare import Prepared
from speechlm2_jax.experiment import Model, RunSettings
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.models.duplex_stt import DuplexSTTModel
from speechlm2_jax.planning.bins import Bin, estimate, estimate_2d
from speechlm2_jax.planning.options import BUCKETS, PlanOptions
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.protocol import CompletesBatches
from speechlm2_jax.training.run.preparation import Setup

BUDGETS = ("batch_size", "batch_tokens", "batch_duration", "quadratic_factor", "quadratic_duration")
"""Keys that bins with their rows replace."""
_BINS = ("use_bucketing", "num_buckets", "bucket_duration_bins", "bucket_batch_size")


@dataclass(frozen=True, kw_only=True)
class PlannedData:
    """The training set of a run, which can be planned with any bins."""

    run: RunSettings
    model: Model
    setup: Setup

    def __post_init__(self) -> None:
        train = self.settings
        if not train:
            raise SettingsError("data.train_ds: required for a plan")
        if train.get("multi_config"):
            raise SettingsError(
                "data.train_ds.multi_config: each of its sets has bins of its own; plan a "
                "configuration with one of them as train_ds"
            )
        if train.get("packed"):
            raise SettingsError(
                "data.train_ds.packed: packed rows have one length and no bins; set packed: false "
                "to plan bins"
            )
        if isinstance(self.model, CompletesBatches):
            raise SettingsError(
                "this model adds transcripts to its batches, so that the memory of a bin is known "
                "only when it is run; plans are not supported"
            )

    @property
    def settings(self) -> Mapping[str, Any]:
        """The `train_ds` block."""
        return self.run.values["data"].get("train_ds") or {}

    @property
    def groups(self) -> int:
        """Groups of a global batch."""
        return self.setup.sharding.data_parallel_size

    def module(self, keys: Mapping[str, Any], *, is_logged: bool = False) -> DataModule:
        """The data with other bins; with `is_logged` it is told what is left out."""
        kept = {k: v for k, v in self.settings.items() if k not in (*BUDGETS, *_BINS)}
        own = {k: v for k, v in self.run.values["data"].items() if not k.endswith("_ds")}
        data = {**own, TRAIN: {**kept, **keys}}
        with _reports(logging.WARNING if is_logged else logging.ERROR):
            made = experiment.make_data(data, self.model)
            self.setup.prepare_data(self.model, made, self.groups)
        return made

    def bins(self, options: PlanOptions) -> list[Bin]:
        """Those that the options ask for, or those of the settings."""
        own = self.settings.get("bucket_duration_bins")
        if own and options.buckets is None and options.buckets_2d is None:
            return list(own)
        count = options.buckets or BUCKETS
        keys = {"use_bucketing": True, "num_buckets": count, "batch_size": 1}
        prepared = self.module(keys, is_logged=True).prepared(TRAIN)
        if options.buckets_2d is not None:
            return estimate_2d(prepared, *options.buckets_2d)
        multiple = math.lcm(TOKENS_MULTIPLE, self.setup.sharding.length_multiple)
        return estimate(prepared, count, multiple)

    def keys(self, bins: Sequence[Bin], rows: Sequence[int]) -> dict[str, Any]:
        """NeMo's keys of a plan, in `train_ds`."""
        is_tokens = self.counts_tokens
        found: dict[str, Any] = {"use_multimodal_sampling": True} if is_tokens else {}
        found |= {
            "use_bucketing": True,
            "num_buckets": len(bins),
            "bucket_duration_bins": list(bins),
            "bucket_batch_size": list(rows),
        }
        found |= {key: None for key in BUDGETS if self.settings.get(key) is not None}
        longest = bins[-1]
        if not isinstance(longest, list):
            found["max_tokens" if is_tokens else "max_duration"] = longest
        return found

    @property
    def counts_tokens(self) -> bool:
        """Whether lengths are tokens, else seconds."""
        return not isinstance(self.model, DuplexS2SModel | DuplexSTTModel)


def members_of(prepared: Prepared, bins: Sequence[Bin]) -> list[tuple[Bin, Members]]:
    """The bins that hold conversations, each with what it holds."""
    members, contents = prepared.sampler.plan.members, prepared.contents
    if len(members) == len(bins):
        return list(zip(bins, members, strict=True))
    if not isinstance(bins[0], list):
        edges = np.asarray(bins, np.float64)
        places = [int(np.searchsorted(edges, one.longest, side="left")) for one in members]
    elif isinstance(contents, IndexedContents):
        raise SettingsError(
            f"data.train_ds.bucket_duration_bins: {len(bins) - len(members)} bins hold no "
            "conversation; leave them out"
        )
    else:
        of_rows: Any = contents
        present = np.unique(of_rows.measures.bins)
        places = [int(place) for place in present if place < len(bins)]
    return [(bins[place], one) for place, one in zip(places, members, strict=True)]


def shape_with(prepared: Prepared, members: Members, rows: int) -> Shape:
    """The shape of a bin with so many rows."""
    contents: Any = prepared.contents
    return contents.shape(replace(members, rows=rows))


def empty_batch(prepared: Prepared, shape: Shape, groups: int) -> HostBatch:
    """A batch of empty rows; it takes the memory of one group at most."""
    one = prepared.contents.assemble([[]], shape)
    arrays = one.map(lambda x: np.broadcast_to(x, (groups, *x.shape[1:])))
    return HostBatch(arrays=arrays, ids=(), bucket=shape.name)


@contextmanager
def _reports(level: int) -> Generator[None]:
    """Shows what is told of a planned data set from so high a level on."""
    logger = logging.getLogger(plan_report.__name__)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
