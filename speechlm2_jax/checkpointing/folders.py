"""Folder and file names of a run's checkpoints."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from speechlm2_jax.checkpointing.checksums import is_marked, verify

CHECKPOINTS = "checkpoints"
FROZEN = "frozen"
ARRAY_ITEMS = ("params", "buffers", "opt")
CONTENTS = "contents"
"""Note in the checksums of frozen/: the checksum of its arrays. Steps repeat it as `frozen`."""
UNKNOWN = "unknown"
RANKED = "ranked"
"""Note of a step: there is a ranking beside it."""


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


def has_checksums(run: Path) -> bool:
    """Whether a version that writes checksums wrote a run, by the metadata of its steps."""
    return any(is_marked(step) for step in step_folders(run))


def set_aside_newer(folder: Path, step: int) -> None:
    """Renames checkpoints after `step`, which could not be read, so that new ones take their place.

    Called on one process only, before a Checkpointer is made.
    """
    for newer in step_folders(folder):
        if int(newer.name) > step:
            target = folder / f"unreadable_{newer.name}"
            shutil.rmtree(target, ignore_errors=True)
            newer.rename(target)


def set_aside_frozen(folder: Path) -> None:
    """Renames the frozen store, which was rebuilt, so that it is written again.

    Called on one process only, before a Checkpointer is made.
    """
    target = folder / f"unreadable_{FROZEN}"
    shutil.rmtree(target, ignore_errors=True)
    if (folder / FROZEN).exists():
        (folder / FROZEN).rename(target)


def read_item(step: Path, name: str) -> dict[str, Any]:
    """Reads a JSON item of one checkpoint. Raises DamagedError if it has changed.

    One process may call it alone. Orbax's own reader would wait for all processes of the run.
    """
    verify(step, below=f"{name}/")
    return json.loads((step / name / "metadata").read_text(encoding="utf-8"))


def quiet_orbax() -> None:
    """Drops Orbax's log records: they describe its own options, and what fails is raised too."""
    logger = logging.getLogger("absl")
    if _drop_orbax not in logger.filters:
        logger.addFilter(_drop_orbax)


def _drop_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno >= logging.CRITICAL
