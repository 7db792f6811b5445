"""Composition root: the only module that imports every package."""

import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from speechlm2_jax import models, processes
from speechlm2_jax.aot.chips import read_topology
from speechlm2_jax.aot.programs import generation_report, training_report
from speechlm2_jax.aot.report import Report
from speechlm2_jax.aot.shapes import largest_shape
from speechlm2_jax.checkpointing import step_folders
from speechlm2_jax.console import phase
from speechlm2_jax.conversion.errors import MissingWeightsError
from speechlm2_jax.data.blocks import named_sets
from speechlm2_jax.data.datamodule import DataModule
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.data.duplex.stt_dataset import DuplexSTTDataset
from speechlm2_jax.data.fusion import training_sets
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.models.ctc import CTCModel
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.models.duplex_stt import DuplexSTTModel
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.components import lora_class
from speechlm2_jax.pretrained.errors import USER_ERRORS
from speechlm2_jax.settings import (
    CompileAhead,
    SettingsError,
    find,
    ignored_report,
    key_problems,
    load,
    raise_all,
    require_complete,
)
from speechlm2_jax.settings.targets import selected_problems
from speechlm2_jax.strategies import STRATEGIES
from speechlm2_jax.training.exp_manager import ExpManagerConfig
from speechlm2_jax.training.optimizer import OPTIMIZERS
from speechlm2_jax.training.run import hosts
from speechlm2_jax.training.run.disk_errors import DiskError
from speechlm2_jax.training.run.preparation import Setup
from speechlm2_jax.training.schedules import SCHEDULES
from speechlm2_jax.training.trainer import FitResult, Trainer, exp_manager
from speechlm2_jax.training.trainer_config import TrainerConfig
from speechlm2_jax.validation_scores import validation_scores

BLOCKS = ("model", "trainer", "data", "exp_manager")
IGNORED = {"name": "exp_manager.name names the run"}
"""Keys beside the blocks, as NeMo's configs page has them, and why they mean nothing here."""
REQUIRED = ("model", "data")
FRAME_TOLERANCE = 0.01
"""Largest relative difference between sample rates of data and model."""
Model = SALM | DuplexS2SModel | DuplexSTTModel | CTCModel


@contextmanager
def clear_errors(program: str) -> Generator[None]:
    """Turns errors that a user can fix into one line on stderr and exit code 2.

    A full or read-only disk prints a few lines and exits with 1.
    """
    try:
        yield
    except USER_ERRORS as error:
        print(f"{program}:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except DiskError as error:
        try:
            print(f"{program}: {error}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # the full disk may be that of stderr; a normal exit would print a traceback
            os._exit(1)  # of each background writer


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, its data and a trainer, ready to run."""

    model: Model
    datamodule: DataModule
    trainer: Trainer
    settings: Mapping[str, object]

    def dry_run(self) -> None:
        """Prints what `fit` would do. Needs no weights."""
        self.trainer.dry_run(self.model, self.datamodule)

    def fit(self) -> FitResult:
        """Trains, and scores generated text at every validation."""
        metrics, scoring = validation_scores(self.model, self.trainer.config.validation_metrics)
        return self.trainer.fit(
            *(self.model, self.datamodule),
            validation_metrics=metrics,
            validation_scoring=scoring,
            settings=self.settings,
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run, read and checked once; its trainer is built once."""

    values: Mapping[str, Any]
    near: tuple[Path, ...]
    """Folders that names of components are relative to, after the working folder."""

    @cached_property
    def _trainer(self) -> tuple[Trainer, Mapping[str, str]]:
        """The trainer, and the ignored keys of its block."""
        with ignored_report() as ignored:
            return Trainer(**self.values.get("trainer", {})), ignored

    def initialize_processes(self) -> None:
        """Connects the processes of a multi-process run, which must agree. Raises SettingsError."""
        nodes = self.values.get("trainer", {}).get("num_nodes", 1)
        processes.initialize(nodes if isinstance(nodes, int) else 1)
        hosts.check_start(self.values)

    def is_finished(self) -> bool:
        """Whether the run is finished; if so, logs how to extend it. Reads no weights."""
        trainer, _ = self._trainer
        return trainer.finished(self.values.get("exp_manager"), self.values) is not None

    def count_from_process_start(self, importing_s: float | None) -> None:
        """Lets the times of the run be those of the whole process, which imported so long."""
        if importing_s is not None:
            self._trainer[0].count_from_process_start(importing_s)

    def build(self, *, dry_run: bool = False, keep_compiled: bool = False) -> Experiment:
        """Builds everything that the settings describe; see the function `build`."""
        settings, missing = self.values, list[str]()
        trainer, of_trainer = self._trainer
        if keep_compiled:
            trainer.keep_compiled_programs()
        with ignored_report() as ignored:
            model = make_model(settings["model"], self.near)
            datamodule = make_data(settings["data"], model)
            trainer.check(model)
            if dry_run:
                trainer.check_experiment(settings.get("exp_manager"))
                missing = missing_weights(model)
            else:
                exp_manager(trainer, settings.get("exp_manager"))
                if not trainer.has_checkpoint:
                    with phase("checking the weights"):
                        model.check_weights()  # fails early if they are missing or do not fit
        beside = {key: reason for key, reason in IGNORED.items() if key in settings}
        for path, reason in {**beside, **of_trainer, **ignored}.items():
            print(f"ignored: {path}: {reason}", file=sys.stderr)
        for note in (*model.notes, *missing):
            print(f"note: {note}", file=sys.stderr)
        return Experiment(model=model, datamodule=datamodule, trainer=trainer, settings=settings)

    def compile_ahead(self, asked: CompileAhead) -> Report:
        """Compiles the training step, or generation, for a TPU topology; estimates its cost.

        Reads neither weights nor data. Raises SettingsError for settings that do not fit together,
        and for a program that does not fit into a chip's memory.
        """
        model = make_model(self.values["model"], self.near)
        if not isinstance(model, SALM):
            raise SettingsError("--compile-for: only SALM is supported")
        topology = read_topology(asked.topology, asked.libtpu)
        trainer, _ = self._trainer
        with trainer.config.matmul_precision():
            setup = Setup.of(model, trainer.config, trainer.strategy, devices=topology.devices)
            train = self.values["data"].get("train_ds") or {}
            shape = largest_shape(train, asked, model, setup)
            if asked.generates:
                return generation_report(model, setup, topology, shape, asked.new_tokens)
            return training_report(model, setup, topology, shape)


def read_run(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str | Path] = (),
    model_alone: bool = False,
) -> RunSettings:
    """Reads a YAML by path or name, and those `over` it. Raises SettingsError; builds nothing.

    With `model_alone` only the model block must be complete, as to compile ahead of time.
    """
    path = find(config)
    settings = load(path, overrides, complete=not model_alone, over=over)
    check_blocks(settings, complete=not model_alone)
    if model_alone:
        require_complete({"model": settings["model"]})
    else:
        check_keys(settings)
        check_start(settings)
    return RunSettings(values=settings, near=(path.resolve().parent,))


def build(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    keep_compiled: bool = False,
) -> Experiment:
    """Builds everything that a YAML describes. Raises SettingsError before any compilation.

    A `dry_run` makes no run directory and loads no weights; it checks the weights that exist. With
    `keep_compiled` the compilation cache is on before the model is built, so that the program that
    initialises random weights is cached too.
    """
    return read_run(config, overrides).build(dry_run=dry_run, keep_compiled=keep_compiled)


def missing_weights(model: Model) -> list[str]:
    """Checks the pretrained weights that exist. Returns a note on missing ones.

    Raises ConversionError or SettingsError for weights that do not fit.
    """
    try:
        model.check_weights()
    except MissingWeightsError as error:
        return [f"{error}; training would stop here"]
    return []


def check_start(settings: Mapping[str, Any]) -> None:
    """Raises SettingsError if `init_from_checkpoint` names the run directory itself."""
    name = (settings.get("model") or {}).get("init_from_checkpoint")
    folder = (settings.get("exp_manager") or {}).get("explicit_log_dir")
    if not name or not folder or Path(name).resolve() != Path(folder).resolve():
        return
    if step_folders(Path(folder)):
        raise SettingsError(
            f"model.init_from_checkpoint: {name} is the run directory of this very run, which "
            "would resume; choose another exp_manager.explicit_log_dir for the new run"
        )


def check_blocks(settings: Mapping[str, object], *, complete: bool = True) -> None:
    """Raises SettingsError for a block that is unknown, missing or (`complete`) incomplete."""
    unknown = sorted(set(settings) - set(BLOCKS) - set(IGNORED))
    if unknown:
        raise SettingsError(f"{unknown[0]}: unknown block; the blocks are {', '.join(BLOCKS)}")
    for name in REQUIRED:
        if name not in settings:
            raise SettingsError(f"{name}: this block is required")
    if complete:
        require_complete(settings)


def check_keys(settings: Mapping[str, Any]) -> None:
    """Raises one SettingsError that names every unknown or refused key of all blocks."""
    model, data = settings["model"], settings["data"]
    kind = model_kind(model)
    dataset = data_kind(kind)
    blocks: list[tuple[type[Any], Any, str]] = [
        (kind.CONFIG, model, "model"),
        (TrainerConfig, settings.get("trainer"), "trainer"),
        (dataset.data_config, data, "data"),
        (ExpManagerConfig, settings.get("exp_manager"), "exp_manager"),
    ]
    if not issubclass(kind, CTCModel):
        blocks.insert(1, (PerceptionConfig, model.get("perception"), "model.perception"))
        blocks.insert(2, (lora_class(model), model.get("lora"), "model.lora"))
    training = training_sets(data.get("train_ds"), "data.train_ds").sets.values()
    blocks += [(dataset.loader_config, own, where) for own, where in training]
    for name in ("validation_ds", "test_ds"):
        sets = named_sets(data.get(name), name).values()
        blocks += [(dataset.loader_config, own, where) for own, where in sets]
    selected = [
        (OPTIMIZERS, model.get("optimizer"), "model.optimizer"),
        (SCHEDULES, model.get("lr_scheduler"), "model.lr_scheduler"),
        (STRATEGIES, (settings.get("trainer") or {}).get("strategy"), "trainer.strategy"),
    ]
    problems = [problem for block in blocks for problem in key_problems(*block)]
    raise_all([*problems, *(p for block in selected for p in selected_problems(*block))])


def make_model(cfg: Mapping[str, object], near: tuple[Path, ...]) -> Model:
    """Makes the kind of model that a `model:` block describes. Raises SettingsError."""
    return model_kind(cfg)(cfg, near=near)


def model_kind(cfg: Mapping[str, object]) -> type[Model]:
    """The model class of a `model:` block, by name or by its keys. Raises SettingsError."""
    return getattr(models, registry.trained_class(cfg))


def make_data(cfg: Mapping[str, object], model: Model) -> DataModule:
    """Makes the data of a `data:` block as the model takes it. Raises SettingsError."""
    if not isinstance(model, DuplexS2SModel | DuplexSTTModel):
        name = model.cfg.get("prompt_format")
        name = name if isinstance(name, str) else None
        packs = not isinstance(model, CTCModel)
        dataset = SALMDataset(model.tokenizer, prompt_format=name, packs=packs)
        return DataModule(cfg, tokenizer=model.tokenizer, dataset=dataset)
    dataset = _duplex_dataset(cfg, model)
    return DataModule(cfg, tokenizer=model.tokenizer, dataset=dataset)


def data_kind(kind: type[Model]) -> type[SALMDataset] | type[DuplexS2SDataset]:
    """The class that reads the data of a class of models."""
    if issubclass(kind, DuplexSTTModel):
        return DuplexSTTDataset
    return DuplexS2SDataset if issubclass(kind, DuplexS2SModel) else SALMDataset


def _duplex_dataset(
    cfg: Mapping[str, object], model: DuplexS2SModel | DuplexSTTModel
) -> DuplexS2SDataset:
    """The data set of a duplex model. Raises SettingsError for rates that are not the model's."""
    wanted = {
        "source_sample_rate": model.sampling_rate,
        "frame_length": model.token_equivalent_duration,
    }
    if isinstance(model, DuplexSTTModel):
        dataset: DuplexS2SDataset = DuplexSTTDataset.of_block(
            cfg, model.tokenizer, has_user_text=model.predict_user_text
        )
    else:
        dataset = DuplexS2SDataset.from_config(cfg, model.tokenizer, model.max_frames)
        wanted["target_sample_rate"] = model.target_sampling_rate
    for key, value in wanted.items():
        given = getattr(dataset, key)
        if abs(given / value - 1) > FRAME_TOLERANCE:
            raise SettingsError(f"data.{key}={given} does not fit the model, which expects {value}")
    return dataset
