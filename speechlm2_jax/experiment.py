"""Composition root: the only module that knows every room."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.batches import HostBatch, LossSum
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.evaluation.wer import count_errors
from speechlm2_jax.models import SALM
from speechlm2_jax.settings import SettingsError, ignored_report, load
from speechlm2_jax.training.trainer import Trainer, exp_manager

MODELS: Mapping[str, type[SALM]] = {"salm": SALM}
"""What `model_class` may name; a YAML without it is a SALM's."""
DATASETS = {"salm": SALMDataset}
BLOCKS = ("model", "trainer", "data", "exp_manager")
USER_ERRORS = (SettingsError, ConversionError)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns what a user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(_exit_line(str(error)))


def _exit_line(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, its data and a trainer, ready to run."""

    model: SALM
    datamodule: DataModule
    trainer: Trainer

    def fit(self) -> int:
        """Trains; returns the process's exit code."""
        return self.trainer.fit(self.model, self.datamodule) or 0


def build(config: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Builds everything that a YAML describes. Raises SettingsError before any compilation."""
    settings = load(config, overrides)
    unknown = set(settings) - set(BLOCKS)
    if unknown:
        raise SettingsError(f"unknown block(s) {sorted(unknown)}; a YAML has {', '.join(BLOCKS)}")
    with ignored_report() as ignored:
        trainer = Trainer(**settings.get("trainer", {}))
        model = SALM(settings["model"])
        datamodule = DataModule(
            settings["data"],
            tokenizer=model.tokenizer,
            dataset=SALMDataset(tokenizer=model.tokenizer),
        )
        exp_manager(trainer, settings.get("exp_manager"))
    for path, reason in ignored.items():
        print(f"ignored: {path} ({reason})", file=sys.stderr)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    return Experiment(model=model, datamodule=datamodule, trainer=trainer)


def word_error_rate(model: SALM, max_new_tokens: int = 128) -> Callable[[HostBatch], LossSum]:
    """A validation metric: answers each conversation and counts word errors."""

    def metric(batch: HostBatch) -> LossSum:
        raise AssertionError

    return metric
