"""Run directories: finds the newest one, and reads what its settings tell about the training."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax import bundled, checkpointing
from speechlm2_jax.data.paths import expand_shards
from speechlm2_jax.data.storage.addresses import name_of
from speechlm2_jax.evaluation.metrics.wer import Normalizer
from speechlm2_jax.evaluation.run_folders import run_folders
from speechlm2_jax.evaluation.training_data import TrainingData
from speechlm2_jax.object_store.folders import address_of
from speechlm2_jax.pretrained import training_settings
from speechlm2_jax.pretrained.locate import Location, config_folders
from speechlm2_jax.pretrained.near_paths import RUNS
from speechlm2_jax.settings import SettingsError, load

CONFIG = "config.yaml"
REPOSITORY = bundled.ROOT
"""Root of the clone that this package is imported from, or its copy in an installed package."""
TRAIN = "python train.py --config salm"
MANIFEST_KEYS = ("manifest_filepath", "cuts_path")
_FULL_PRECISION = ("32", "32-true")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory with at least one finished checkpoint."""

    folder: Path
    settings: Mapping[str, Any]
    """Contents of config.yaml; empty if there is none."""

    @functools.cached_property
    def step(self) -> tuple[int, str]:
        """The step whose weights are evaluated, and why that one."""
        chosen = checkpointing.intact_step(self.folder)
        if chosen is None:  # loading the model reports why
            return int(checkpointing.step_folders(self.folder)[0].name), "damaged"
        ranking = checkpointing.read_ranking(self.folder / checkpointing.CHECKPOINTS)
        step, metric = int(chosen.name), ranking.retention.monitor
        is_best = ranking.retention.score((ranking.metrics.get(step) or {}).get(metric)) is not None
        return step, f"best {metric}" if is_best else "the last"

    @property
    def is_remote(self) -> bool:
        """Whether `folder` is a copy of a run at an address."""
        return address_of(self.folder) is not None

    @property
    def output_folder(self) -> Path:
        """Where outputs are written by default: the run directory.

        Of a run at an address, a folder of its name in the working folder: nobody looks into the
        cache, which holds the copy.
        """
        address = address_of(self.folder)
        return self.folder if address is None else Path(name_of(address))

    def tag(self, name: str) -> str | None:
        """The first value of a tag (context, system_prompt) among the training sources."""
        return training_settings.first_tag(self.settings, name)

    @property
    def dtype(self) -> str:
        """The compute dtype of the training."""
        precision = str((self.settings.get("trainer") or {}).get("precision", ""))
        return "float32" if precision in _FULL_PRECISION else "bfloat16"

    @property
    def max_audio_s(self) -> float | None:
        """The longest recording of the training, if its settings say so."""
        return training_settings.longest_audio_s(self.settings)

    def encoder_file(self) -> Path | None:
        """The `.nemo` file that its encoder was loaded from, if it is on this machine."""
        name = (self.settings.get("model") or {}).get("pretrained_asr")
        return self.find_file(str(name)) if name else None

    def training_data(self, normalize: Normalizer) -> TrainingData:
        """What its training manifests hold, as far as they can be read."""
        found = TrainingData(normalize)
        for source in training_settings.sources(training_settings.train_block(self.settings)):
            names = [name for key in MANIFEST_KEYS for name in _names(source.get(key))]
            if not names and "input_cfg" not in source:
                found.unread.append(f"a source of type {source.get('type')}")
            for name in names:
                path = self.find_file(name)
                if path is None:
                    found.unread.append(name)
                else:
                    found.add(path)
        return found

    def find_file(self, name: str) -> Path | None:
        """Finds a component or manifest as training does: here, then beside the settings files."""
        return Location(near=(self.folder, *config_folders())).local(name)


def read_run(path: str | Path) -> Run | None:
    """The run in a folder; None if the folder is no run directory with a checkpoint."""
    folder = Path(path).expanduser()
    inside = folder / checkpointing.CHECKPOINTS
    if not inside.is_dir() or not checkpointing.step_folders(folder):
        return None
    config = folder / CONFIG
    return Run(folder=folder, settings=load(config, complete=False) if config.is_file() else {})


def runs_below(root: Path = RUNS) -> Iterator[Run]:
    """The runs of all kinds of model below `root`; first that whose last checkpoint is newest."""
    for folder in sorted(run_folders(root), key=_last_saved_s, reverse=True):
        if (run := read_run(folder)) is not None:
            yield run


def newest_run(root: Path = RUNS) -> Run:
    """The speech LLM below `root` whose last checkpoint is the newest.

    Raises SettingsError, naming the command that makes a run, if there is none.
    """
    for run in runs_below(root):
        if "pretrained_llm" in (run.settings.get("model") or {}):
            return run
    raise SettingsError(
        f"no run with a checkpoint below {root}/; train one with `{TRAIN}`, or name a model with "
        "pretrained_name=PATH"
    )


def bundled_test_set() -> Path:
    """corpus/test.jsonl of the working folder, else of the project.

    Raises SettingsError if neither exists.
    """
    name = Path("corpus") / "test.jsonl"
    for path in (name, REPOSITORY / name):
        if path.is_file():
            return path
    raise SettingsError(f"inputs: no {name} here or in {REPOSITORY}; name a test set, inputs=PATH")


def _last_saved_s(run: Path) -> float:
    return max((s.stat().st_mtime for s in checkpointing.step_folders(run)), default=0.0)


def _names(value: object) -> list[str]:
    """The paths of a manifest key (one or a list), with shard patterns expanded."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return expand_shards(tuple(name for name in names if isinstance(name, str)))
