"""Validation of every named set: device losses, host metrics, and means over the sets."""

import contextlib
import heapq
import itertools
import logging
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax

from speechlm2_jax.batches import HostBatch, LossSum
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.protocol import (
    AveragesTokens,
    HasPerplexity,
    HostMetric,
    Sample,
    Scored,
    Scorer,
    Scoring,
    TrainableModel,
)
from speechlm2_jax.training.run.stopping import StopRequest
from speechlm2_jax.training.run.throughput import Throughput
from speechlm2_jax.training.trainer_config import TrainerConfig
from speechlm2_jax.training.validation_shares import joined

log = logging.getLogger(__name__)

PERPLEXITY = "perplexity"
IN_FLIGHT = 4
"""Validation batches dispatched before the sums of the oldest are read."""
Evaluate = Callable[[HostBatch], Mapping[str, LossSum]]
"""A batch -> its sums by name: `loss` and the metrics."""


class Interrupted(Exception):
    """The run was asked to stop while validating."""


@dataclass
class Mean:
    """A running mean in double precision, over elements or over batches."""

    of_batches: bool
    total: float = 0.0
    count: float = 0.0

    def add(self, share: LossSum) -> None:
        """Adds one batch's sum; a batch without scored elements is ignored."""
        total, count = float(share.total), float(share.count)
        if count == 0:
            return
        self.total += total / count if self.of_batches else total
        self.count += 1.0 if self.of_batches else count

    def add_all(self, shares: Iterable[LossSum]) -> None:
        """Adds the sums of several batches."""
        for share in shares:
            self.add(share)

    def value(self) -> float | None:
        """The mean, None if nothing was scored."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The result of one validation."""

    metrics: dict[str, float]
    """`val_<metric>_<set>` and `val_<metric>`, its mean over the sets."""
    samples: dict[str, list[Sample]]
    """Set -> a few hypotheses to be shown. They are of the same conversations each time."""


@dataclass(frozen=True, kw_only=True)
class Validator:
    """The settings of validation. `run` validates once."""

    host_metrics: Mapping[str, HostMetric]
    nemo_exact: bool
    """Means of batch means, as NeMo takes them, instead of means over elements."""
    scoring: Scoring | None = None
    limit: int | float | None = None
    """Batches of each set (int), or a fraction of the set (float)."""
    has_perplexity: bool = False
    """Whether the exponential of the mean loss of a set's tokens is a metric too."""
    samples: int = 0
    """Number of hypotheses of each set that are shown."""
    is_shared: bool = False
    """Whether each of several processes generates for its own groups only (`own_only`)."""
    should_stop: Callable[[], bool] = field(default=lambda: False)
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes a context manager that is entered around each wait for a batch, to measure it."""

    def run(
        self,
        sets: Mapping[str, Iterable[HostBatch]],
        evaluate: Evaluate,
        limit: int | None = None,
    ) -> Validation:
        """Validates every set.

        `evaluate` computes the sums of a batch on the device. `limit` (batches of each set)
        replaces the validator's own limit. Raises Interrupted if `should_stop` returns True.
        """
        results: dict[str, float] = {}
        samples: dict[str, list[Sample]] = {}
        by_metric: dict[str, list[float]] = {}
        with nullcontext() if self.scoring is None else self.scoring() as scorer:
            for name, batches in sets.items():
                taken = take(batches, self.limit if limit is None else limit, name)
                values, hypotheses = self._run_set(name, taken, evaluate, scorer)
                if chosen := choose_samples(hypotheses, self.samples):
                    samples[name] = chosen
                if not values:
                    log.warning("validation set %s has nothing to score and is skipped", name)
                for metric, value in values.items():
                    results[f"val_{metric}_{name}"] = value
                    by_metric.setdefault(metric, []).append(value)
            if scorer is not None:
                if self.is_shared:
                    scorer.gather()
                results |= {f"val_{key}": value for key, value in scorer.compute().items()}
        means = {f"val_{m}": math.fsum(values) / len(values) for m, values in by_metric.items()}
        return Validation(metrics={**means, **results}, samples=samples)

    def _run_set(
        self, name: str, batches: Iterable[HostBatch], evaluate: Evaluate, scorer: Scorer | None
    ) -> tuple[dict[str, float], list[Sample]]:
        """Validates one set. Returns the metrics that have a value, and all hypotheses."""
        means = {metric: Mean(of_batches=self.nemo_exact) for metric in self.host_metrics}
        means |= {PERPLEXITY: Mean(of_batches=False)} if self.has_perplexity else {}
        host_sums: dict[str, list[LossSum]] = {metric: [] for metric in self.host_metrics}
        hypotheses: list[Sample] = []
        pending: deque[Mapping[str, LossSum]] = deque()

        def collect(sums: Mapping[str, LossSum]) -> None:
            for metric, share in jax.device_get(dict(sums)).items():
                means.setdefault(metric, Mean(of_batches=self.nemo_exact)).add(share)

        for batch in self._waited(batches):
            if self.should_stop():
                raise Interrupted
            pending.append(self._with_perplexity(evaluate(batch)))
            for metric, compute in self.host_metrics.items():
                host_sums[metric].append(compute(batch))
            hypotheses += [] if scorer is None else scorer.update(name, batch)
            if len(pending) > IN_FLIGHT:
                collect(pending.popleft())
        for sums in pending:
            collect(sums)
        every = [share for shares in host_sums.values() for share in shares]
        hypotheses += [s for share in every if isinstance(share, Scored) for s in share.samples]
        if self.is_shared:
            host_sums, hypotheses = joined(host_sums, choose_samples(hypotheses, self.samples))
        for metric, shares in host_sums.items():
            means[metric].add_all(shares)
        return self._values(means), hypotheses

    def _with_perplexity(self, sums: Mapping[str, LossSum]) -> Mapping[str, LossSum]:
        """The sums of a batch, and once more those of the loss: their mean becomes a perplexity."""
        return {**sums, PERPLEXITY: sums["loss"]} if self.has_perplexity else sums

    def _values(self, means: Mapping[str, Mean]) -> dict[str, float]:
        """The metrics that have a value."""
        values = {metric: mean.value() for metric, mean in means.items()}
        if self.has_perplexity:
            values[PERPLEXITY] = perplexity(values[PERPLEXITY])
        return {metric: value for metric, value in values.items() if value is not None}

    def _waited(self, batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
        iterator = iter(batches)
        while True:
            with self.waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch


def perplexity(mean_nats: float | None) -> float | None:
    """The exponential of a mean loss; infinite where a float cannot hold it, None of None."""
    with contextlib.suppress(OverflowError):
        return None if mean_nats is None else math.exp(mean_nats)
    return math.inf


def make_validator(
    model: TrainableModel,
    config: TrainerConfig,
    metrics: Mapping[str, HostMetric] | None,
    scoring: Scoring | None,
    stop: StopRequest | None = None,
    throughput: Throughput | None = None,
    *,
    is_shared: bool = False,
) -> Validator:
    """Makes the validator. `metrics` replace the model's own.

    `throughput` measures the time of waiting for data.
    """
    averages_tokens = isinstance(model, AveragesTokens) and model.averages_tokens
    return Validator(
        host_metrics=model.validation_metrics if metrics is None else metrics,
        scoring=scoring,
        nemo_exact=model.nemo_exact and not averages_tokens,
        has_perplexity=(
            PERPLEXITY in config.validation_metrics
            and isinstance(model, HasPerplexity)
            and model.loss_is_of_tokens
        ),
        limit=config.limit_val_batches,
        samples=config.num_val_samples,
        is_shared=is_shared,
        should_stop=lambda: stop is not None and stop.poll() is not None,
        waiting=lambda: (
            nullcontext() if throughput is None else throughput.measure("validation_data_wait")
        ),
    )


def choose_samples(hypotheses: Sequence[Sample], count: int) -> list[Sample]:
    """Chooses `count` hypotheses by a hash of their ids.

    The choice is the same each time, and does not depend on the length of the conversations.
    """
    return heapq.nsmallest(count, hypotheses, key=lambda s: (zlib.crc32(s.id.encode()), s.id))


def take(batches: Iterable[HostBatch], limit: int | float | None, name: str) -> Iterable[Any]:
    """The first `limit` batches. A float is a fraction of the set.

    Raises SettingsError for a float if the length of the set is unknown.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0) or limit == -1:
        return batches
    if isinstance(limit, float):
        length = getattr(batches, "__len__", None)
        if length is None:
            raise SettingsError(
                f"trainer.limit_val_batches={limit} is a fraction of validation set {name}, whose "
                "length is unknown; give a number of batches (an integer)"
            )
        limit = int(length() * limit)
    return itertools.islice(batches, limit)
