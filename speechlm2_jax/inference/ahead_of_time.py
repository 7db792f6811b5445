"""Compilation of generation for devices that need not exist on this machine."""

from typing import Any

import jax
import numpy as np

from speechlm2_jax.batches import BatchShape, full_batch
from speechlm2_jax.inference import generate
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.request.generation_request import read_request


def compile_ahead(engine: Engine, shape: BatchShape, max_new_tokens: int) -> Any:
    """Compiles generation for `engine.placement`, whose devices need not exist on this machine.

    Nothing runs, so `engine.variables` may be mere shapes (`meshes.variable_layout`). `shape` is
    that of the prompts of one data-parallel shard. Returns the result of
    `jax.jit(...).lower(...).compile()`.
    """
    placement = engine.placement
    assert placement is not None
    batch = full_batch(
        shape,
        placement.data_parallel_size,
        frame_count=engine.frame_count,
        placeholder_id=engine.audio_locator_tag_id,
    )
    arrays = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        *(batch, placement.batch(batch)),
    )
    limits = np.full(arrays.sequence_ids.shape, max_new_tokens, np.int32)
    decoding = read_request(engine).fitting(limits)
    lowered = generate.generate_batch.lower(*engine.network, arrays, limits, decoding, placement)
    return lowered.compile()
