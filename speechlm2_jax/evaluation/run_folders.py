"""Finds the folders of runs. It imports nothing slow, so that programs can look for them first."""

import os
from collections.abc import Iterator
from pathlib import Path

from speechlm2_jax.checkpointing import CHECKPOINTS
from speechlm2_jax.pretrained.near_paths import RUNS


def run_folders(root: Path = RUNS) -> Iterator[Path]:
    """Folders below `root` that contain checkpoints/; not searched further inside."""
    for folder, inside, _ in os.walk(root):
        if CHECKPOINTS in inside:
            inside.clear()
            yield Path(folder)
