"""Checkpoints of a run: saving in the background, keeping the best and the latest, restoring.

    checkpoints/frozen/          frozen parameters, written once per run
    checkpoints/<step>/params    trained parameters, fp32
                      /buffers   batch-norm statistics and other carried arrays
                      /opt       optimizer state and counters
                      /progress  JSON: data state, counters (the loop's own)
                      /settings  JSON: the model's settings
                      /checksums.xxh3  of every file of the step; frozen/ has one too
    checkpoints/ranking.json     validation metrics by step, and the monitored one

A step appears by one rename, so a killed save leaves the ones before it whole. Checksums are
written before that rename, and compared before anything of a step is used. Orbax writes;
arrays are placed by the reader's template, on whatever mesh it names.

What writes and reads arrays is imported on first use, because it imports JAX (0.6 s) and Orbax
(0.25 s): commands that only look for checkpoints do without.
"""

import importlib
from typing import TYPE_CHECKING, Any

from speechlm2_jax.checkpointing.checksums import (
    DamagedError,
    read_checksums,
    verify_listed,
    write_checksums,
)
from speechlm2_jax.checkpointing.choosing import LayoutError, choose, intact_step
from speechlm2_jax.checkpointing.folders import (
    CHECKPOINTS,
    has_checksums,
    read_item,
    set_aside_frozen,
    set_aside_newer,
    step_folders,
)
from speechlm2_jax.checkpointing.ranking import Ranking, Retention, read_ranking

if TYPE_CHECKING:
    from speechlm2_jax.checkpointing.restoring import (
        RebuildOnHost,
        Restored,
        Weights,
        load_weights,
        restore,
    )
    from speechlm2_jax.checkpointing.saving import Checkpointer

_ON_FIRST_USE = {
    "Checkpointer": "speechlm2_jax.checkpointing.saving",
    "RebuildOnHost": "speechlm2_jax.checkpointing.restoring",
    "Restored": "speechlm2_jax.checkpointing.restoring",
    "Weights": "speechlm2_jax.checkpointing.restoring",
    "load_weights": "speechlm2_jax.checkpointing.restoring",
    "restore": "speechlm2_jax.checkpointing.restoring",
}

__all__ = [
    "CHECKPOINTS",
    "Checkpointer",
    "DamagedError",
    "LayoutError",
    "Ranking",
    "RebuildOnHost",
    "Restored",
    "Retention",
    "Weights",
    "choose",
    "has_checksums",
    "intact_step",
    "load_weights",
    "read_checksums",
    "read_item",
    "read_ranking",
    "restore",
    "set_aside_frozen",
    "set_aside_newer",
    "step_folders",
    "verify_listed",
    "write_checksums",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'speechlm2_jax.checkpointing' has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
