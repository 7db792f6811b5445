"""The contract between data and models: what a batch holds, and how rows are laid out.

Letters: `G` groups, `C` clips of a group, `S` samples, `R` rows of a group, `T` LLM steps. A group
is what one NeMo rank would get; its rows refer only to their own clips, so on the device the gather
of audio frames into text never crosses the batch axes. Everything here is NumPy on the host.
"""

from speechlm2_jax.batches.duplex import (
    DuplexBatch,
    DuplexExample,
    DuplexShape,
    assemble_duplex_batch,
    full_duplex_batch,
)
from speechlm2_jax.batches.salm import (
    BatchShape,
    SalmBatch,
    SalmExample,
    SequenceLayout,
    assemble_salm_batch,
    full_batch,
    layout_sequence,
)
from speechlm2_jax.batches.shared import FrameCount, HostBatch, LossSum, StepLosses

__all__ = [
    "BatchShape",
    "DuplexBatch",
    "DuplexExample",
    "DuplexShape",
    "FrameCount",
    "HostBatch",
    "LossSum",
    "SequenceLayout",
    "SalmBatch",
    "SalmExample",
    "StepLosses",
    "assemble_duplex_batch",
    "assemble_salm_batch",
    "full_batch",
    "full_duplex_batch",
    "layout_sequence",
]
