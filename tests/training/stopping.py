"""A run as an earlier stop would have left it."""

import json
import shutil
from pathlib import Path

from speechlm2_jax.checkpointing import step_folders


def as_after(run: Path, copy: Path, step: int) -> Path:
    """Copies a run directory as it was when `step` had been saved."""
    shutil.copytree(run, copy)
    for folder in step_folders(copy):
        if int(folder.name) > step:
            shutil.rmtree(folder)
    metrics = copy / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(x for x in lines if json.loads(x).get("step", 0) <= step))
    return copy
