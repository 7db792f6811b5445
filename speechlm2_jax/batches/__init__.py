"""Batches: the interface between data and models.

Letters: `G` groups, `C` clips of a group, `S` samples, `R` sequences of a group, `T` tokens. A
group is the local batch of one data-parallel shard (of one rank in NeMo). Its sequences refer only
to its own clips, so gathering audio frames into the text needs no communication over the batch
axes. Everything here is NumPy on the host.
"""

from speechlm2_jax.batches.duplex import (
    DuplexBatch,
    DuplexExample,
    DuplexShape,
    assemble_duplex_batch,
    full_duplex_batch,
)
from speechlm2_jax.batches.duplex_stt import (
    DuplexSttBatch,
    assemble_duplex_stt_batch,
    full_duplex_stt_batch,
)
from speechlm2_jax.batches.insertion import follow_placeholders, insert_after_clips
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
    "DuplexSttBatch",
    "FrameCount",
    "HostBatch",
    "LossSum",
    "SequenceLayout",
    "SalmBatch",
    "SalmExample",
    "StepLosses",
    "assemble_duplex_batch",
    "assemble_duplex_stt_batch",
    "assemble_salm_batch",
    "follow_placeholders",
    "full_batch",
    "full_duplex_batch",
    "full_duplex_stt_batch",
    "insert_after_clips",
    "layout_sequence",
]
