"""Saves checkpoints in the background; keeps the best and the latest."""

import functools
import logging
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.checkpointing.checksums import (
    CHECKSUMS,
    MARK,
    read_checksums,
    write_checksums,
)
from speechlm2_jax.checkpointing.committing import with_checksums
from speechlm2_jax.checkpointing.contents import are_local, contents_of
from speechlm2_jax.checkpointing.folders import (
    ARRAY_ITEMS,
    CONTENTS,
    FROZEN,
    RANKED,
    UNKNOWN,
    quiet_orbax,
    step_folders,
)
from speechlm2_jax.checkpointing.ranking import Ranking, Retention, read_ranking, write_ranking

log = logging.getLogger(__name__)
FAILED_WAIT_S = 10.0
"""Seconds for a checkpoint that is being written when one of several processes has failed."""


class Checkpointer:
    """Writes the checkpoints of one run, in the background."""

    def __init__(self, folder: Path, retention: Retention):
        quiet_orbax()
        self.folder, self.retention = Path(folder).absolute(), retention
        ranking = read_ranking(self.folder)
        self._metrics = ranking.metrics
        self._unranked: frozenset[int] = frozenset()
        if ranking.problem:
            log.warning("%s, and those that are there stay", ranking.problem)
            self._unranked = frozenset(int(step.name) for step in step_folders(self.folder))
        if jax.process_index() == 0:
            # not Orbax's own cleaning: it runs in the background and takes the frozen save with it
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_RetentionPolicy(self),
                temporary_path_class=with_checksums(self._notes),
                lightweight_initialize=True,  # reads no metadata, which may be damaged
            ),
        )
        self._frozen_contents: Callable[[], str] = lambda: UNKNOWN
        self._frozen_writer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            temporary_path_class=with_checksums(lambda: {CONTENTS: self._frozen_contents()}),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest step saved or being saved, None if there is none."""
        return self._manager.latest_step()

    @property
    def has_frozen(self) -> bool:
        """Whether the frozen parameters of this run are written."""
        return (self.folder / FROZEN).exists()

    def save_frozen(self, frozen: Mapping[str, AnyArray], has_frozen: bool | None = None) -> None:
        """Starts writing the frozen parameters, unless this run has them already.

        `has_frozen` is the value that all processes agreed on: one of them may see a folder that
        another has just created.
        """
        if not frozen:
            return
        if self.has_frozen if has_frozen is None else has_frozen:
            self._read_frozen_contents(frozen)
            return
        known = None if are_local(frozen) else contents_of(frozen)
        self._frozen_contents = functools.cache(lambda: known or contents_of(frozen))
        item = ocp.args.PyTreeSave(dict(frozen))
        self._frozen_writer.save(self.folder / FROZEN, args=item, custom_metadata=MARK)

    def _read_frozen_contents(self, frozen: Mapping[str, AnyArray]) -> None:
        """Reads the checksum of the stored frozen parameters; older versions have none."""
        folder = self.folder / FROZEN
        if jax.process_index() == 0 and not (folder / CHECKSUMS).exists():
            contents = contents_of(frozen) if are_local(frozen) else UNKNOWN
            write_checksums(folder, {CONTENTS: contents})
        written = read_checksums(folder) if jax.process_index() == 0 else None
        contents = UNKNOWN if written is None else written.notes[CONTENTS]
        self._frozen_contents = lambda: contents

    def _notes(self) -> Mapping[str, str]:
        """Notes in a step's checksums: which frozen parameters belong to it."""
        notes = {FROZEN: self._frozen_contents()} if self.has_frozen else {}
        return notes | ({RANKED: "yes"} if self._metrics else {})

    def save(
        self,
        step: int,
        arrays: Mapping[str, PyTree],
        *,
        progress: Mapping[str, object],
        settings: Mapping[str, object],
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
            self._frozen_writer.wait_until_finished()  # a step is unusable without them
            self._manager.save(
                step, args=ocp.args.Composite(**items), force=True, custom_metadata=MARK
            )
        except Exception as error:
            raise RuntimeError(f"cannot save step {step} in {self.folder}: {error}") from error

    def rank(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the validation metrics of a step that is or will be saved."""
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        kept = {n: v for n, v in self._metrics.items() if n in self._manager.all_steps()}
        self._metrics = {**kept, step: finite}
        if jax.process_index() == 0:
            write_ranking(self.folder, Ranking(retention=self.retention, metrics=self._metrics))

    def keeps(self, steps: Sequence[int]) -> list[bool]:
        """Which of the steps, oldest first, stay."""
        if self.retention.top_k < 0:
            return [True] * len(steps)
        present = {step: self._metrics[step] for step in steps if step in self._metrics}
        best = self.retention.best(present)[: self.retention.top_k]
        latest = steps[-self.retention.latest :]
        kept = {*best, *latest, *self._unranked}
        return [step in kept for step in steps]

    def wait(self) -> None:
        """Returns when everything is on disk. Raises RuntimeError if a save failed."""
        try:
            self._frozen_writer.wait_until_finished()
            self._manager.wait_until_finished()
        except Exception as error:
            raise RuntimeError(f"cannot save in {self.folder}: {error}") from error

    def exit(self, kind: object, error: BaseException | None, _traceback: object) -> None:
        """Closes it, as the end of a `with` block does.

        After an error on one of several processes the others may never finish their part of a
        save, which all must commit. So it is waited for `FAILED_WAIT_S` and then given up.
        """
        if error is None or jax.process_count() == 1:
            return self.close()

        def wait() -> None:
            with suppress(RuntimeError):  # the first error is the one that is told
                self.wait()

        waiting = threading.Thread(target=wait, name="last save", daemon=True)
        waiting.start()
        waiting.join(FAILED_WAIT_S)
        if waiting.is_alive():
            log.warning("the other processes did not finish their part of a checkpoint; given up")

    def close(self) -> None:
        """Waits for saves and ends the threads."""
        self.wait()
        self._frozen_writer.close()
        self._manager.close()


@dataclass(frozen=True)
class _RetentionPolicy:
    """The checkpointer's choice as Orbax asks for it (its PreservationPolicy)."""

    checkpointer: Checkpointer

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        return self.checkpointer.keeps([info.step for info in checkpoints])
