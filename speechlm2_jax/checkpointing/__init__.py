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
"""

from speechlm2_jax.checkpointing.checksums import (
    DamagedError,
    read_checksums,
    verify_listed,
    write_checksums,
)
from speechlm2_jax.checkpointing.folders import (
    CHECKPOINTS,
    has_checksums,
    read_item,
    set_aside_frozen,
    set_aside_newer,
    step_folders,
)
from speechlm2_jax.checkpointing.ranking import Ranking, Retention, read_ranking
from speechlm2_jax.checkpointing.restoring import (
    LayoutError,
    RebuildOnHost,
    Restored,
    Weights,
    choose,
    intact_step,
    load_weights,
    restore,
)
from speechlm2_jax.checkpointing.saving import Checkpointer

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
