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

from speechlm2_jax.checkpointing.folders import (
    CHECKPOINTS,
    read_json,
    set_aside_newer,
    step_folders,
)
from speechlm2_jax.checkpointing.ranking import Ranking, Retention, read_ranking
from speechlm2_jax.checkpointing.restoring import (
    LayoutError,
    Restored,
    Weights,
    load_weights,
    restore,
)
from speechlm2_jax.checkpointing.saving import Checkpointer

__all__ = [
    "CHECKPOINTS",
    "Checkpointer",
    "LayoutError",
    "Ranking",
    "Restored",
    "Retention",
    "Weights",
    "load_weights",
    "read_json",
    "read_ranking",
    "restore",
    "set_aside_newer",
    "step_folders",
]
