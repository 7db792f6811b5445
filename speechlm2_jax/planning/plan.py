"""Plans bins and rows by the memory that the compiler tells of each training program."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from speechlm2_jax import experiment
from speechlm2_jax.aot.chips import GIB, read_topology
from speechlm2_jax.aot.programs import is_too_large
from speechlm2_jax.console import phase
from speechlm2_jax.conversion.errors import MissingWeightsError
from speechlm2_jax.data.bucketing import Members, Shape
from speechlm2_jax.data.datamodule import TRAIN, DataModule
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.data.prepare import Prepared
from speechlm2_jax.experiment import RunSettings
from speechlm2_jax.inspection.facts import BATCHES, Padding, padding, planned_batches
from speechlm2_jax.planning.bins import Bin
from speechlm2_jax.planning.data import PlannedData, empty_batch, members_of, shape_with
from speechlm2_jax.planning.memory import device_memory, program_bytes
from speechlm2_jax.planning.options import PlanOptions
from speechlm2_jax.planning.rows import Fit, base_of, most_rows
from speechlm2_jax.planning.timing import random_batch, step_seconds
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.programs import Programs
from speechlm2_jax.training.run.preparation import Setup, initialize
from speechlm2_jax.training.run.run_state import RunState
from speechlm2_jax.training.trainer import Trainer

ROWS_READ = 10_000
"""Conversations of a large data set whose padding is measured."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlannedBin:
    """One bin of a plan."""

    longest: Bin
    rows: int
    """Of a group."""
    memory_bytes: float
    """What a device needs for its training program."""
    padding: float
    """Share of its LLM positions."""
    share: float
    """Of all conversations."""
    examples: int
    """Of one optimizer step, on all devices together."""
    shape: Shape
    seconds: float | None = None
    """Of one optimizer step; None: not measured."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bins with the most rows that fit, and what they give."""

    bins: tuple[PlannedBin, ...]
    keys: Mapping[str, Any]
    """NeMo's keys, for `data.train_ds`."""
    limit_bytes: float
    memory_bytes: float
    """Of a device; the limit is a share of it."""
    devices: str
    compilations: int
    compiled_in_s: float
    padding: Padding

    @property
    def examples_per_s(self) -> float | None:
        """Over all bins, by their shares of the data; None if not all were measured."""
        total = 0.0
        for one in self.bins:
            if one.seconds is None:
                return None
            total += one.share * one.seconds / one.examples
        return 1 / total


def make_plan(run: RunSettings, options: PlanOptions) -> Plan:
    """Estimates bins, finds their rows, and measures padding and speed.

    Raises SettingsError for settings that cannot be planned, and where one row does not fit.
    """
    topology = None if options.topology is None else read_topology(options.topology, options.libtpu)
    model = experiment.make_model(run.values["model"], run.near)
    trainer = Trainer(**run.values.get("trainer", {}))
    with trainer.config.matmul_precision():
        setup = Setup.of(
            *(model, trainer.config, trainer.strategy),
            devices=None if topology is None else topology.devices,
        )
        if options.memory_gib is not None:
            memory = options.memory_gib * GIB
        elif topology is not None:
            memory = topology.chip.memory_bytes
        else:
            memory = device_memory(setup.devices[0])
        planner = Planner(
            data=PlannedData(run=run, model=model, setup=setup),
            options=options,
            memory_bytes=memory,
            programs=setup.programs(model),
        )
        return planner.plan()


@dataclass(kw_only=True)
class Planner:
    """Compiles the training programs of one run."""

    data: PlannedData
    options: PlanOptions
    memory_bytes: float
    """Of a device."""
    programs: Programs
    compilations: int = 0
    compiled_in_s: float = 0.0

    @property
    def limit_bytes(self) -> float:
        """What a program may need."""
        platform = self.data.setup.sharding.platform
        return self.memory_bytes * self.options.fraction_on(platform)

    def plan(self) -> Plan:
        """The whole plan; see `make_plan`."""
        data, setup = self.data, self.data.setup
        bins = data.bins(self.options)
        prepared = data.module(data.keys(bins, [1] * len(bins))).prepared(TRAIN)
        members = members_of(prepared, bins)
        fits = self._fits(prepared, members)
        keys = data.keys([one for one, _ in members], [fit.rows for fit in fits])
        module = data.module(keys)
        final = module.prepared(TRAIN)
        total = sum(one.count for _, one in members)
        found = [
            PlannedBin(
                longest=longest,
                rows=fit.rows,
                memory_bytes=fit.memory_bytes,
                padding=1 - one.filled / (one.count * bucket.shape.tokens),
                share=one.count / total,
                examples=fit.rows * data.groups * setup.config.accumulate_grad_batches,
                shape=bucket.shape,
            )
            for (longest, one), fit, bucket in zip(
                members, fits, final.sampler.plan.buckets, strict=True
            )
        ]
        if self.options.is_timed and self.options.topology is None:
            found = self._timed(final, found)
        kind = setup.devices[0].device_kind
        return Plan(
            bins=tuple(found),
            keys=keys,
            limit_bytes=self.limit_bytes,
            memory_bytes=self.memory_bytes,
            devices=f"{len(setup.devices)} x {kind}",
            compilations=self.compilations,
            compiled_in_s=self.compiled_in_s,
            padding=_padding(module, final, found),
        )

    def _fits(self, prepared: Prepared, members: Sequence[tuple[Bin, Members]]) -> list[Fit]:
        """The most rows of each bin, from the longest to the shortest, in the order of bins."""
        fits: list[Fit] = []
        base: float | None = None
        tokens = 0
        for number, (longest, one) in reversed(list(enumerate(members))):
            own = shape_with(prepared, one, 1).tokens
            guess = int(fits[-1].rows * tokens / own) if fits else None
            name = f"bin {number + 1} of {len(members)} (up to {format_bin(longest)})"
            most = max(one.count // self.data.groups, 1)
            fits.append(
                most_rows(
                    lambda rows, one=one, name=name: self._memory_of(prepared, one, rows, name),
                    self.limit_bytes,
                    most=min(most, self.options.max_rows or most),
                    guess=guess,
                    base_bytes=base,
                )
            )
            self._check(fits[-1], name)
            base, tokens = base_of(fits[-1].sizes) if base is None else base, own
        return fits[::-1]

    def _memory_of(self, prepared: Prepared, members: Members, rows: int, name: str) -> float:
        """Bytes of the training program of a bin with so many rows, which is compiled."""
        batch = empty_batch(prepared, shape_with(prepared, members, rows), self.data.groups)
        begin = time.monotonic()
        found = program_bytes(lambda: self.programs.compile_ahead(batch))
        self.compilations += 1
        self.compiled_in_s += time.monotonic() - begin
        _log.info("%s: %d rows need %.3f GiB", name, rows, found / GIB)
        return found

    def _check(self, fit: Fit, name: str) -> None:
        if not fit.rows:
            raise SettingsError(
                f"{name}: one row needs {fit.memory_bytes / GIB:.2f} GiB of "
                f"{self.limit_bytes / GIB:.2f} GiB; leave long conversations out "
                "(max_tokens, max_duration), set trainer.remat=full, or shard the model over more "
                "devices (trainer.strategy)"
            )

    def _timed(self, prepared: Prepared, bins: Sequence[PlannedBin]) -> list[PlannedBin]:
        """The bins with the seconds of their steps, unless weights are missing."""
        model, setup = self.data.model, self.data.setup
        try:
            state = initialize(model, setup)
        except MissingWeightsError as error:
            _log.warning("not timed: %s", error)
            return list(bins)
        timed: list[PlannedBin] = []
        for one in bins:
            with phase(f"timing {one.shape.name}"):
                timed.append(replace(one, seconds=self._seconds(prepared, state, one.shape)))
            if timed[-1].seconds is None:
                return [*timed, *bins[len(timed) :]]  # the failed step has taken the state
        return timed

    def _seconds(self, prepared: Prepared, state: RunState, shape: Shape) -> float | None:
        data = self.data
        batch = random_batch(
            *(shape, data.groups),
            frame_count=data.model.frame_count,
            placeholder_id=getattr(prepared.contents, "placeholder_id", -1),
        )
        try:
            accumulate = data.setup.config.accumulate_grad_batches
            return step_seconds(self.programs, state, batch, accumulate)
        except jax.errors.JaxRuntimeError as error:
            if not is_too_large(error):
                raise
            _log.warning(
                "%s: the device had no room for it, though its program should fit; lower "
                "--memory-fraction",
                shape.name,
            )
            return None


def format_bin(longest: Bin) -> str:
    """The bin as text: `120`, `3.52`, or `45 x 12` for input and output."""
    return " x ".join(map(str, longest)) if isinstance(longest, list) else f"{longest}"


def _padding(module: DataModule, prepared: Prepared, bins: Sequence[PlannedBin]) -> Padding:
    """Of the first batches; a large data set is read for it, so fewer."""
    count = BATCHES
    if isinstance(prepared.contents, IndexedContents):
        count = max(ROWS_READ // max(one.examples for one in bins), 1)
    return padding(prepared, planned_batches(module, TRAIN, count))
