"""The data of a run: train, validation and test sets as streams of batches of static shape."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechlm2_jax.batches import FrameCount, HostBatch
from speechlm2_jax.data.blocks import named_sets, read_data_set, shared_keys
from speechlm2_jax.data.bucketing import BucketPlan, Shape
from speechlm2_jax.data.faults import Dropped, ErrorLog, ErrorRate, Faults
from speechlm2_jax.data.frame_counts import CachedFrameCount
from speechlm2_jax.data.fusion import ZIP, assembling, joined_shape, training_sets
from speechlm2_jax.data.index.windows import WindowSampler
from speechlm2_jax.data.manifest_watch import ManifestWatch
from speechlm2_jax.data.prepare import DataKind, DataSet, Prepared, prepare
from speechlm2_jax.data.reading import ExampleReader
from speechlm2_jax.data.salm_concatenation import SalmConcatenation
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.streams.opening import is_stream, prepare_stream, stream_batches
from speechlm2_jax.data.time_limit import TimeLimit
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import SettingsError, build, require_complete

if TYPE_CHECKING:  # Grain is loaded with the first stream
    from speechlm2_jax.data.index.planned_windows import PlannedWindows
    from speechlm2_jax.data.loader import BatchReader, BatchStream, PlannedBatches
    from speechlm2_jax.data.streams.batches import StreamBatches

TOKENS_MULTIPLE = 8
"""LLM positions of every shape are a multiple of it, as vector units prefer."""
TRAIN = "train_ds"


class DataModule:
    """Training, validation and test data.

    Args:
        cfg: the `data` block with NeMo's keys, as a plain mapping.
        tokenizer: the model's, with its audio locator tag added.
        dataset: the kind of data: a SALMDataset, made of the tokenizer if absent, or a
            DuplexS2SDataset.

    Raises SettingsError for a bad key or value, and for a manifest that is missing or cannot be
    read: everything but the audio is read here.
    """

    def __init__(
        self, cfg: Mapping[str, object], tokenizer: Tokenizer, dataset: DataKind | None = None
    ) -> None:
        require_complete({"data": cfg})
        self.tokenizer = tokenizer
        self.dataset: DataKind = SALMDataset(tokenizer) if dataset is None else dataset
        config = build(self.dataset.data_config, cfg, "data")
        self.dataset.check(config, "data")
        self._shared = shared_keys(config)
        self._sets: dict[str, DataSet] = {}
        blocks = training_sets(config.train_ds, "data.train_ds")
        self._fusion = blocks.fusion
        for name, (values, where) in blocks.sets.items():
            path = TRAIN if blocks.fusion is None else f"{TRAIN}.{name}"
            self._sets[path] = self._read(values, where, is_train=True)
            if blocks.fusion is not None and is_stream(self._sets[path]):
                raise SettingsError(f"{where}: fused sets are read at random; add stream: false")
        self._trained = tuple(self._sets)
        self._sets |= self._read_named(config.validation_ds, "validation_ds")
        self._sets |= self._read_named(config.test_ds, "test_ds")
        self._groups: int | None = None
        self._prepared: dict[str, Prepared] = {}
        self._faults: dict[str, Faults] = {}
        self._watches = {
            name: ManifestWatch(where=one.where, files=[f for s in one.sources for f in s.files])
            for name, one in self._sets.items()
        }
        if self._fusion is not None:
            files = [file for name in self._trained for file in self._watches[name].files]
            self._watches[TRAIN] = ManifestWatch(where="data.train_ds", files=files)
        self._error_log: ErrorLog | None = None

    @property
    def dropped(self) -> Mapping[str, int]:
        """Conversations left out so far, by cause.

        Those that settings leave out count once; those whose audio cannot be used count in every
        epoch of training that meets them, and once in validation.
        """
        total: dict[str, int] = {}
        filtered = [prepared.filtered for prepared in self._prepared.values()]
        for counts in [*filtered, *(faults.dropped.counts for faults in self._faults.values())]:
            for cause, count in counts.items():
                total[cause] = total.get(cause, 0) + count
        return total

    def setup(
        self,
        *,
        frame_count: FrameCount,
        groups: int = 1,
        pad_to_multiple: int = TOKENS_MULTIPLE,
        own_groups: Sequence[int] | None = None,
    ) -> None:
        """Tokenises and measures everything and plans the shapes, which are logged as a table.

        Args:
            frame_count: samples of a clip -> LLM steps that perception makes of it.
            groups: the data-parallel size of this run.
            pad_to_multiple: what the mesh needs LLM steps to be a multiple of.
            own_groups: the groups of a training batch that are read here (None: all), where
                several processes share a run. `validation_batches` takes a choice.

        Raises SettingsError if nothing is left to train or validate on.
        """
        frame_count = CachedFrameCount(frame_count)
        self._groups = groups
        self._own_groups = None if own_groups is None else frozenset(own_groups)
        multiple = math.lcm(TOKENS_MULTIPLE, pad_to_multiple)
        self._prepared = {
            name: (prepare_stream if is_stream(data_set) else prepare)(
                data_set, self.dataset, frame_count, groups, multiple
            )
            for name, data_set in self._sets.items()
        }
        for name in self._trained:  # worker processes know all up to the longest
            for bucket in self.plan(name).buckets:
                frame_count(getattr(bucket.shape, "samples", 0))

    def train_batches(
        self, state: Mapping[str, Any] | None = None
    ) -> "BatchStream | StreamBatches":
        """Training batches without end, from the start or from a state.

        The stream has `get_state()` and `set_state(state)`. A state keeps the groups of the run
        that it comes from. Raises SettingsError, a ValueError, if they cannot be split among
        this run's devices, listing the data-parallel sizes that can.
        """
        if not self._trained:
            raise SettingsError("data.train_ds: required for training")
        groups = self._this_run()
        had = groups if state is None else int(state["groups"])
        if had % groups:
            fitting = ", ".join(str(n) for n in range(1, had + 1) if had % n == 0)
            raise SettingsError(
                f"this run's global batches have {had} groups, which {groups} data-parallel "
                f"devices cannot share; resume with a data-parallel size of {fitting}"
            )
        stream = self._train_stream(had)
        if state is not None:
            stream.set_state(dict(state))
        else:
            self._faults[TRAIN].resume({}, (0, 0))
        return stream

    def _train_stream(self, groups: int) -> "BatchStream | StreamBatches":
        if self._fusion is not None:
            return self._fused_stream(groups)
        if not is_stream(self._sets[TRAIN]):
            return self._stream(TRAIN, groups)
        return stream_batches(
            self._sets[TRAIN],
            self._prepared[TRAIN],
            self.dataset,
            groups,
            self._own_groups,
            self._faults_of(TRAIN),
            self._watches[TRAIN],
        )

    def validation_batches(self, *, own_only: bool = False) -> dict[str, Iterable[HostBatch]]:
        """One pass over each validation set, by name; the last batch is padded with empty rows.

        With `own_only` the groups that `setup` did not name as this process's own stay empty, and
        so do their references.
        """
        return self._passes("validation_ds", own_only=own_only)

    def fingerprints(self) -> dict[str, str]:
        """A text that changes with the data and the shapes, for each validation set."""
        groups = self._this_run()
        names = [name for name in self._sets if name.startswith("validation_ds.")]
        readers = {name: self._reader(name, groups) for name in names}
        return {n: f"{r.fingerprint:08x} {r.contents_fingerprint}" for n, r in readers.items()}

    def test_batches(self) -> dict[str, Iterable[HostBatch]]:
        """One pass over each test set, by name."""
        return self._passes("test_ds")

    def training_shapes(self) -> dict[str, Callable[[], HostBatch]]:
        """By the bucket's name, small to large: makes a batch of empty rows of a planned shape."""
        plans = [self.plan(name) for name in self._trained]
        shapes = [[bucket.shape for bucket in plan.buckets] for plan in plans]
        if self._fusion is not None and self._fusion.sampler_fusion == ZIP:
            shapes = [[joined_shape(pair) for pair in itertools.product(*shapes)]]
        return {
            shape.name: functools.partial(self._empty_batch, shape)
            for own in shapes
            for shape in own
        }

    def batches_per_pass(self) -> int:
        """Global batches of one pass over the training data; of a large set, about."""
        counts = [count for count, _ in self._pass_lengths()]
        is_joined = self._fusion is not None and self._fusion.sampler_fusion == ZIP
        return min(counts) if is_joined else sum(counts)

    @property
    def is_estimated(self) -> bool:
        """Whether `batches_per_pass` is an estimate."""
        return any(is_estimated for _, is_estimated in self._pass_lengths())

    def _pass_lengths(self) -> list[tuple[int, bool]]:
        self._this_run()
        return [self._prepared[name].sampler.batches_per_pass() for name in self._trained]

    def plan(self, name: str = TRAIN) -> BucketPlan:
        """The planned shapes of `train_ds`, `validation_ds.NAME` or `test_ds.NAME`.

        Those of fused training sets are at `train_ds.NAME`.
        """
        self._this_run()
        return self._prepared[name].sampler.plan

    @property
    def names(self) -> list[str]:
        """`train_ds`, `validation_ds.NAME` and `test_ds.NAME`: the configured sets."""
        return list(self._sets)

    def plans(self, name: str = TRAIN) -> "Iterator[BatchPlan]":
        """The batches of one pass over a data set, in order; nothing is read.

        Raises SettingsError for a stream, whose batches are known when they are read.
        """
        if is_stream(self._sets[name]):
            raise SettingsError(f"data.{name}: a stream has no plan of its batches; stream: false")
        return _plans(self._reader(name, self._this_run()), epochs=1)

    def prepared(self, name: str = TRAIN) -> Prepared:
        """The planned data set of a name."""
        self._this_run()
        return self._prepared[name]

    def _empty_batch(self, shape: Shape) -> HostBatch:
        contents = assembling([self._prepared[name].contents for name in self._trained])
        arrays = contents.assemble([[]] * self._this_run(), shape)
        return HostBatch(arrays=arrays, ids=(), bucket=shape.name)

    def _this_run(self) -> int:
        if self._groups is None:
            raise RuntimeError("call DataModule.setup(frame_count=...) first")
        return self._groups

    def _passes(self, block: str, *, own_only: bool = False) -> dict[str, Iterable[HostBatch]]:
        self._this_run()
        names = [name for name in self._sets if name.startswith(f"{block}.")]
        return {name.removeprefix(f"{block}."): _Passes(self, name, own_only) for name in names}

    def _stream(self, name: str, groups: int, *, own_only: bool = True) -> "BatchStream":
        from speechlm2_jax.data.loader import BatchStream
        from speechlm2_jax.data.pipeline import Workers

        reader = self._reader(name, groups, own_only=own_only)
        is_train = self._sets[name].is_train
        watch = self._watches[name] if is_train else None
        config = self._prepared[name].config
        # processes take seconds to start, which a pass over validation data would not earn
        processes = config.worker_processes if is_train else 0
        workers = Workers(threads=config.num_workers, processes=processes)
        make_plans = functools.partial(_plans, reader, None if is_train else 1)
        return BatchStream(make_plans, reader, self._faults_of(name), workers, watch)

    def _fused_stream(self, groups: int) -> "BatchStream":
        from speechlm2_jax.data.fused_plans import FusedPlans
        from speechlm2_jax.data.fused_reader import FusedReader
        from speechlm2_jax.data.loader import BatchStream
        from speechlm2_jax.data.pipeline import Workers

        assert self._fusion is not None
        names = {name.removeprefix(f"{TRAIN}."): name for name in self._trained}
        readers = {name: self._reader(path, groups) for name, path in names.items()}
        fusion = self._fusion

        def make_plans() -> FusedPlans:
            return FusedPlans(
                {name: _plans(reader, epochs=None) for name, reader in readers.items()},
                fusion,
                next(iter(readers.values())).sampler.seed,
                is_endless=any(reader.sampler.endless for reader in readers.values()),
            )

        workers = Workers(threads=fusion.num_workers, processes=fusion.worker_processes)
        return BatchStream(
            make_plans,
            FusedReader(parts=readers),
            self._faults_of(TRAIN),
            workers,
            self._watches[TRAIN],
        )

    def _reader(self, name: str, groups: int, *, own_only: bool = True) -> "BatchReader":
        from speechlm2_jax.data.loader import BatchReader

        prepared, data_set = self._prepared[name], self._sets[name]
        is_train = data_set.is_train
        examples = ExampleReader(
            contents=prepared.contents,
            sampler=replace(prepared.sampler, groups=groups),
            sources=[source.name for source in data_set.sources],
            augmentation=data_set.augmentation,
            replaces=is_train,
            limit=TimeLimit(prepared.config.read_timeout),
            concatenate=SalmConcatenation.of(prepared.contents, prepared.config),
        )
        return BatchReader(
            examples=examples,
            with_references=not is_train,
            own_groups=self._own_groups if own_only else None,
        )

    def _faults_of(self, name: str) -> Faults:
        """The count of a data set: of training anew for each stream, else of all passes."""
        data_set = self._sets[self._trained[0] if name == TRAIN else name]
        if data_set.is_train or name not in self._faults:
            where = f"data.{TRAIN}" if name == TRAIN else data_set.where
            rate = ErrorRate(where, data_set.config.max_error_rate)
            dropped = Dropped(count_each_once=not data_set.is_train)
            self._faults[name] = Faults(name=name, rate=rate, dropped=dropped, log=self._error_log)
        return self._faults[name]

    def keep_errors(self, path: Path | None) -> None:
        """Lists recordings that cannot be used in a file of JSON lines, from the next stream on."""
        self._error_log = None if path is None else ErrorLog(path)
        for faults in self._faults.values():
            faults.log = self._error_log

    def errors_by_source(self) -> str:
        """A line per source and cause, of training and validation; empty if nothing failed."""
        tables = (faults.dropped.table() for faults in self._faults.values())
        return "\n".join(table for table in tables if table)

    def _read(self, values: Mapping[str, object], where: str, *, is_train: bool) -> DataSet:
        keys = {**self._shared, **values}
        return read_data_set(self.dataset, keys, where, is_train=is_train)

    def _read_named(self, values: Mapping[str, object] | None, block: str) -> dict[str, DataSet]:
        return {
            f"{block}.{name}": self._read(own, path, is_train=False)
            for name, (own, path) in named_sets(values, block).items()
        }


def _plans(reader: "BatchReader", epochs: int | None) -> "PlannedBatches | PlannedWindows":
    from speechlm2_jax.data.index.planned_windows import PlannedWindows
    from speechlm2_jax.data.loader import PlannedBatches

    sampler = reader.sampler
    if isinstance(sampler, WindowSampler):
        return PlannedWindows(sampler, epochs)
    return PlannedBatches(sampler, epochs)


@dataclass(frozen=True)
class _Passes:
    """A finite set: every iteration is a pass from the start."""

    module: DataModule
    name: str
    own_only: bool

    def __iter__(self) -> Iterator[HostBatch]:
        groups = self.module._this_run()
        return self.module._stream(self.name, groups, own_only=self.own_only)
