"""Checkpoints of a run: saving in the background, keeping the best and the latest, restoring.

    checkpoints/frozen/          frozen parameters, written once per run
    checkpoints/<step>/params    trained parameters, fp32
                      /buffers   batch-norm statistics and other carried arrays
                      /opt       optimizer state and counters
                      /progress  JSON: data state, counters (the loop's own)
                      /settings  JSON: the model's settings
    checkpoints/ranking.json     validation metrics by step, and which one says what is best

A step appears by one rename, so a killed save leaves the ones before it whole. Orbax writes;
arrays are placed by the reader's template, on whatever mesh it names.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

log = logging.getLogger(__name__)

FROZEN = "frozen"
RANKING = "ranking.json"
CHECKPOINTS = "checkpoints"
ARRAY_ITEMS = ("params", "buffers", "opt")
Which = Literal["best_else_last", "best", "last"]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: always the latest, and the best by a validation metric."""

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    top_k: int = 1
    """How many of the best stay; -1 keeps every checkpoint."""

    def score(self, value: float | None) -> float | None:
        """A number that is larger for better values; None for none or a NaN."""
        if value is None or not math.isfinite(value):
            return None
        return value if self.mode == "max" else -value

    def best(self, metrics: Mapping[int, Mapping[str, float | None]]) -> list[int]:
        """The steps that have the monitored metric, best first, of equals the newest first."""
        scores = {step: self.score(values.get(self.monitor)) for step, values in metrics.items()}
        ranked = [(score, step) for step, score in scores.items() if score is not None]
        return [step for _, step in sorted(ranked, reverse=True)]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint read back."""

    step: Path
    """The folder of the checkpoint, named by its step."""
    arrays: dict[str, Any]
    """Per item of the template: the arrays, placed as the template says."""
    frozen: dict[str, Any]
    progress: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a checkpoint alone, on the host."""

    variables: dict[str, np.ndarray]
    """Every parameter and buffer by path."""
    settings: dict[str, Any]
    """The settings of the model that was trained."""
    step: int


class LayoutError(ValueError):
    """A readable checkpoint that holds other variables than the model has."""


class Checkpointer:
    """Writes the checkpoints of one run, in the background."""

    def __init__(self, folder: Path, retention: Retention):
        quiet_orbax()
        self.folder, self.retention = Path(folder).absolute(), retention
        self._metrics = read_ranking(self.folder).metrics
        if jax.process_index() == 0:
            # not Orbax's own cleaning: it runs in the background and takes the frozen save with it
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=_Keeper(self)),
        )
        self._frozen_writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    @property
    def latest_step(self) -> int | None:
        """The newest step saved or being saved, None if there is none."""
        return self._manager.latest_step()

    @property
    def has_frozen(self) -> bool:
        """Whether the frozen parameters of this run are written."""
        return (self.folder / FROZEN).exists()

    def save_frozen(self, frozen: Mapping[str, Any], has_frozen: bool | None = None) -> None:
        """Starts writing the frozen parameters, unless this run has them already.

        Of several processes one may see what another has just begun: then `has_frozen` is what
        they agreed on.
        """
        if frozen and not (self.has_frozen if has_frozen is None else has_frozen):
            item = ocp.args.PyTreeSave(dict(frozen))
            self._frozen_writer.save(self.folder / FROZEN, args=item)

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        *,
        progress: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        """Starts writing one checkpoint; returns once the arrays may be changed.

        `arrays` has the items of `ARRAY_ITEMS`; the other two are plain JSON values. Raises
        RuntimeError if this or the save before it failed.
        """
        items: dict[str, Any] = {
            "progress": ocp.args.JsonSave(dict(progress)),
            "settings": ocp.args.JsonSave(dict(settings)),
        }
        for name in ARRAY_ITEMS:
            if jax.tree.leaves(arrays[name]):
                items[name] = ocp.args.PyTreeSave(arrays[name])
        try:
            self._frozen_writer.wait_until_finished()  # a step without them could not be used
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise RuntimeError(f"cannot save step {step} in {self.folder}: {error}") from error

    def rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes the validation metrics of a step that is saved, or about to be."""
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        kept = {n: v for n, v in self._metrics.items() if n in self._manager.all_steps()}
        self._metrics = {**kept, step: finite}
        if jax.process_index() == 0:
            text = json.dumps(
                {
                    "monitor": self.retention.monitor,
                    "mode": self.retention.mode,
                    "metrics": self._metrics,
                },
                indent=1,
            )
            draft = self.folder / f"{RANKING}.draft"
            draft.write_text(text)
            draft.replace(self.folder / RANKING)

    def keeps(self, steps: Sequence[int]) -> list[bool]:
        """Which of the steps, oldest first, stay."""
        if self.retention.top_k < 0:
            return [True] * len(steps)
        present = {step: self._metrics[step] for step in steps if step in self._metrics}
        best = self.retention.best(present)[: self.retention.top_k]
        return [step in best or step == steps[-1] for step in steps]

    def wait(self) -> None:
        """Returns when everything is on disk. Raises RuntimeError if a save failed."""
        try:
            self._frozen_writer.wait_until_finished()
            self._manager.wait_until_finished()
        except Exception as error:
            raise RuntimeError(f"cannot save in {self.folder}: {error}") from error

    def close(self) -> None:
        """Waits and lets go of threads."""
        self.wait()
        self._frozen_writer.close()
        self._manager.close()


@dataclass(frozen=True)
class _Keeper:
    """The checkpointer's choice as Orbax asks for it (its PreservationPolicy)."""

    checkpointer: Checkpointer

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return self.checkpointer.keeps([info.step for info in checkpoints])


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What ranking.json says."""

    retention: Retention = Retention()
    metrics: dict[int, dict[str, float | None]] = field(default_factory=dict)


def read_ranking(folder: Path) -> Ranking:
    """Reads the ranking of a checkpoints folder; empty if it is not there or damaged."""
    try:
        stored = json.loads((folder / RANKING).read_text())
        return Ranking(
            retention=Retention(monitor=stored["monitor"], mode=stored["mode"]),
            metrics={int(step): values for step, values in stored["metrics"].items()},
        )
    except FileNotFoundError:
        return Ranking()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("cannot read %s (%s); no checkpoint counts as best", folder / RANKING, error)
        return Ranking()


def restore(
    own: Path | None,
    other: Path | None,
    template: Mapping[str, Any],
    frozen_template: Mapping[str, Any],
) -> Restored | None:
    """Finds where a run goes on, in this order.

    1. the run's own newest readable checkpoint (folder `own`);
    2. the newest readable checkpoint of another run, or one step of it (`other`);
    3. None: the run starts from the variables that its model was built with.

    Templates hold `jax.ShapeDtypeStruct`s with shardings. Raises LayoutError if the checkpoint is
    of other variables, RuntimeError if checkpoints are there and none can be read.
    """
    quiet_orbax()
    for folder in (own, other):
        steps = step_folders(folder) if folder is not None else []
        failures = []
        for step in steps:
            try:
                return _read(step, template, frozen_template)
            except LayoutError:
                raise
            except Exception as error:  # whatever a damaged file makes a reader do
                reason = f"{step}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                log.warning("cannot read checkpoint %s; trying the one before it", reason)
                failures.append(reason)
        if failures:
            raise RuntimeError(
                f"no checkpoint of {folder} can be read; move them away to start again:\n  "
                + "\n  ".join(failures)
            )
    return None


def set_aside_newer(folder: Path, step: int) -> None:
    """Renames checkpoints after `step`, which could not be read, so that new ones take their place.

    Called on one process only, before a Checkpointer is made.
    """
    for newer in step_folders(folder):
        if int(newer.name) > step:
            target = folder / f"unreadable_{newer.name}"
            shutil.rmtree(target, ignore_errors=True)
            newer.rename(target)


def step_folders(path: Path) -> list[Path]:
    """The finished checkpoints of a run (its folder or checkpoints/ inside it), newest first.

    `path` may also be one step. Empty if there are none.
    """
    path = Path(path).absolute()
    if path.name.isdigit() and (path / "progress").is_dir():
        return [path]
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if p.name.isdigit() and p.is_dir()]
    return sorted(steps, key=lambda p: int(p.name), reverse=True)


def load_weights(run: str | Path, which: Which | int = "best_else_last") -> Weights:
    """Reads the weights of a run on the host: no optimizer, no data state, no device.

    `run` is a run directory, its checkpoints/ or one step; `which` may be a step number. Best is
    by the metric that the run monitors. Raises FileNotFoundError if there is no such checkpoint.
    """
    quiet_orbax()
    steps = step_folders(Path(run))
    if not steps:
        raise FileNotFoundError(f"{run}: no checkpoint here (looked for {CHECKPOINTS}/<step>)")
    step = _choose(steps, which)
    variables: dict[str, np.ndarray] = {}
    for folder in (step.parent / FROZEN, step / "params", step / "buffers"):
        if folder.is_dir():
            variables.update(_read_host(folder))
    return Weights(variables=variables, settings=read_json(step, "settings"), step=int(step.name))


def read_json(step: Path, name: str) -> dict[str, Any]:
    """Reads a JSON item of one checkpoint."""
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(step / name)


def quiet_orbax() -> None:
    """Drops Orbax's log records: they describe its own options, and what fails is raised too."""
    logger = logging.getLogger("absl")
    if _drop_orbax not in logger.filters:
        logger.addFilter(_drop_orbax)


def _drop_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno >= logging.CRITICAL


def _choose(steps: Sequence[Path], which: Which | int) -> Path:
    if which == "last":
        return steps[0]
    if isinstance(which, int):
        for step in steps:
            if int(step.name) == which:
                return step
        raise FileNotFoundError(f"step {which} is not kept; there are {_names(steps)}")
    ranking = read_ranking(steps[0].parent)
    by_step = {int(step.name): step for step in steps}
    kept = {step: values for step, values in ranking.metrics.items() if step in by_step}
    best = ranking.retention.best(kept)
    if best:
        return by_step[best[0]]
    if which == "best":
        raise FileNotFoundError(
            f"none of the steps {_names(steps)} has a {ranking.retention.monitor}"
        )
    return steps[0]


def _names(steps: Iterable[Path]) -> str:
    return ", ".join(step.name for step in steps)


def _read(step: Path, template: Mapping[str, Any], frozen_template: Mapping[str, Any]) -> Restored:
    """Reads one checkpoint onto the template's placements."""
    progress = read_json(step, "progress")
    for name in ("params", "buffers"):
        _check_paths(step / name, template[name])
    _check_paths(step.parent / FROZEN, frozen_template)
    arrays = {name: _read_placed(step / name, template[name]) for name in template}
    frozen = _read_placed(step.parent / FROZEN, frozen_template)
    return Restored(step=step, arrays=arrays, frozen=frozen, progress=progress)


def _check_paths(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raises LayoutError naming what a checkpoint has too much, too little, or in another shape."""
    if wanted and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing")
    stored = {path: tuple(meta.shape) for path, meta in _metadata(folder).items()}
    expected = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
    if stored == expected:
        return
    differences = [
        *(f"{path} is not in the checkpoint" for path in sorted(expected.keys() - stored.keys())),
        *(f"{path} is not in the model" for path in sorted(stored.keys() - expected.keys())),
        *(
            f"{path} is {stored[path]} in the checkpoint and {expected[path]} in the model"
            for path in sorted(stored.keys() & expected.keys())
            if stored[path] != expected[path]
        ),
    ]
    shown = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
    raise LayoutError(
        f"{folder} was saved by another model or with other freeze_params: {shown}. Use the "
        "settings of that run, or start a new run in another exp_manager.explicit_log_dir"
    )


def _metadata(folder: Path) -> dict[str, Any]:
    """Shapes by path; empty if the item had no arrays."""
    if not folder.is_dir():
        return {}
    with ocp.PyTreeCheckpointer() as reader:
        metadata = reader.metadata(folder)
    tree = getattr(metadata.item_metadata, "tree", None)
    if tree is None:
        raise ValueError(f"{folder}: its metadata cannot be read")
    return dict(tree)


def _read_placed(folder: Path, template: Any) -> Any:
    if not jax.tree.leaves(template):
        return template
    arguments = ocp.checkpoint_utils.construct_restore_args(template)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder, item=template, restore_args=arguments)


def _read_host(folder: Path) -> dict[str, np.ndarray]:
    arguments = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in _metadata(folder)}
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder, restore_args=arguments)
