"""Reads checkpoints: onto a mesh to resume, or only the weights, on the host."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from speechlm2_jax.checkpointing.checksums import (
    DamagedError,
    verify,
    verify_together,
    warn_of_an_older_version,
)
from speechlm2_jax.checkpointing.choosing import LayoutError, Which, choose, ranking_of
from speechlm2_jax.checkpointing.folders import (
    CHECKPOINTS,
    quiet_orbax,
    read_item,
    step_folders,
)
from speechlm2_jax.checkpointing.frozen import FrozenStore, FrozenStoreError

log = logging.getLogger(__name__)

RebuildOnHost = Callable[[Mapping[str, Any], frozenset[str]], Iterable[Mapping[str, np.ndarray]]]
"""From a model's settings and the paths that a step holds: all other parameters, in each form that
a run may have stored them in."""
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint read back."""

    step: Path
    """The folder of the checkpoint, named by its step."""
    arrays: dict[str, PyTree]
    """Per item of the template: the arrays, sharded as the template."""
    frozen: dict[str, jax.Array]
    progress: dict[str, Any]
    has_rebuilt_frozen: bool = False
    """Whether the frozen parameters come from their pretrained source; their store is damaged."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a checkpoint alone, on the host."""

    variables: dict[str, np.ndarray]
    """Every parameter and buffer by path."""
    settings: dict[str, object]
    """The settings of the model that was trained."""
    step: int


def restore(
    own: Path | None,
    other: Path | None,
    template: Mapping[str, PyTree],
    frozen_template: Mapping[str, jax.ShapeDtypeStruct],
    rebuild_frozen: Callable[[], Iterable[Mapping[str, jax.Array]]] | None = None,
) -> Restored | None:
    """Finds the checkpoint from which a run resumes, in this order.

    1. the run's own newest undamaged checkpoint (folder `own`);
    2. the newest undamaged checkpoint of another run, or one step of it (`other`);
    3. None: a new run, which starts from the model's variables.

    Templates hold `jax.ShapeDtypeStruct`s with shardings. `rebuild_frozen` loads the frozen
    parameters from their source, sharded as their template, if that is damaged. Every process
    must call this. Raises LayoutError if the checkpoint has other variables, DamagedError if no
    checkpoint can be read.
    """
    quiet_orbax()
    for folder in (own, other):
        steps = step_folders(folder) if folder is not None else []
        for step in steps:
            try:
                return _read(step, template, frozen_template, rebuild_frozen)
            except (LayoutError, FrozenStoreError):
                raise
            except Exception as error:  # a damaged file can raise anything
                log.warning("%s", _reason(step, error))
        if steps:
            raise _none_left(folder)
    return None


def load_weights(
    run: str | Path,
    which: Which | int = "best_else_last",
    rebuild_frozen: RebuildOnHost | None = None,
) -> Weights:
    """Reads the weights of a run on the host: no optimizer, no data state, no device.

    `run` is a run directory, its checkpoints/ or one step; `which` may be a step number. Best is
    by the metric that the run monitors. A damaged step is named in the log and the next best (or
    last) one is read; nothing is changed in the run directory. `rebuild_frozen` loads the frozen
    parameters from their source if their store is damaged. Raises FileNotFoundError if there is no
    such checkpoint, DamagedError if the requested one is damaged.
    """
    quiet_orbax()
    steps = step_folders(Path(run))
    if not steps:
        raise FileNotFoundError(f"{run}: no checkpoint found (looked for {CHECKPOINTS}/<step>)")
    if which in ("best", "best_else_last") and (problem := ranking_of(steps).problem):
        log.warning("%s", problem)
    while steps:
        step = choose(steps, which)
        try:
            return _read_weights(step, rebuild_frozen)
        except FrozenStoreError:
            raise
        except Exception as error:  # a damaged file can raise anything
            if isinstance(which, int) or len(steps) == 1:
                raise DamagedError(_reason(step, error, "it cannot be used")) from error
            log.warning("%s", _reason(step, error))
            steps.remove(step)
    raise _none_left(Path(run))


def _reason(step: Path, error: Exception, end: str = "trying the one before it") -> str:
    kind = "" if isinstance(error, DamagedError) else f"{type(error).__name__}: "
    text = " ".join(str(error).split())[:_LONGEST_REASON]
    return f"cannot read checkpoint {step}: {kind}{text}; {end}"


def _none_left(folder: Path | None) -> DamagedError:
    return DamagedError(
        f"no checkpoint of {folder} can be read (the lines above say why); move them away to start "
        "a new run"
    )


def _read(
    step: Path,
    template: Mapping[str, PyTree],
    frozen_template: Mapping[str, jax.ShapeDtypeStruct],
    rebuild_frozen: Callable[[], Iterable[Mapping[str, jax.Array]]] | None,
) -> Restored:
    """Reads one checkpoint onto the template's placements."""
    checksums = verify_together(step)
    if checksums is None:
        warn_of_an_older_version(step)
    progress = read_item(step, "progress")
    for name in ("params", "buffers"):
        _check_paths(step / name, template[name])
    store = FrozenStore.beside(step, checksums)
    if frozen_template or store.is_expected:
        frozen, is_rebuilt = store.read(
            verify_together, lambda folder: _read_frozen(folder, frozen_template), rebuild_frozen
        )
    else:
        frozen, is_rebuilt = {}, False
    arrays = {name: _read_sharded(step / name, template[name]) for name in template}
    return Restored(
        step=step,
        arrays=arrays,
        frozen=dict(frozen),
        progress=progress,
        has_rebuilt_frozen=is_rebuilt,
    )


def _read_frozen(folder: Path, template: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
    _check_paths(folder, template)
    return _read_sharded(folder, template)


def _read_weights(step: Path, rebuild_frozen: RebuildOnHost | None) -> Weights:
    checksums = verify(step)
    if checksums is None:
        warn_of_an_older_version(step)
    settings = read_item(step, "settings")
    variables: dict[str, np.ndarray] = {}
    for folder in (step / "params", step / "buffers"):
        if folder.is_dir():
            variables.update(_read_host(folder))
    store = FrozenStore.beside(step, checksums)
    if store.is_expected:
        rebuild = None
        if rebuild_frozen is not None:
            rebuild = functools.partial(rebuild_frozen, settings, frozenset(variables))
        variables.update(store.read(verify, _read_host, rebuild)[0])
    return Weights(variables=variables, settings=settings, step=int(step.name))


def _check_paths(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises LayoutError naming variables that are missing, unknown or of another shape."""
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


def _read_sharded(folder: Path, template: PyTree) -> PyTree:
    if not jax.tree.leaves(template):
        return template
    arguments = ocp.checkpoint_utils.construct_restore_args(template)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder, item=template, restore_args=arguments)


def _read_host(folder: Path) -> dict[str, np.ndarray]:
    arguments = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in _metadata(folder)}
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(folder, restore_args=arguments)
