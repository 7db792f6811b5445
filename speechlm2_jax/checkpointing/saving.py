"""Writing: in the background, keeping the best and the latest."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from speechlm2_jax.checkpointing.folders import ARRAY_ITEMS, FROZEN, quiet_orbax
from speechlm2_jax.checkpointing.ranking import Ranking, Retention, read_ranking, write_ranking


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
            write_ranking(self.folder, Ranking(retention=self.retention, metrics=self._metrics))

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
