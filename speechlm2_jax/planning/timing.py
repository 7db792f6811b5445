"""Seconds of a training step, measured on the devices at hand."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from speechlm2_jax.batches import (
    BatchShape,
    DuplexShape,
    HostBatch,
    full_batch,
    full_duplex_batch,
    full_duplex_stt_batch,
)
from speechlm2_jax.batches.shared import FrameCount
from speechlm2_jax.data.bucketing import Shape
from speechlm2_jax.training.programs import Programs
from speechlm2_jax.training.run.run_state import RunState
from speechlm2_jax.training.step import MicroSums

RUNS = 3
LONGEST_S = 10.0
"""No further run of a step is begun after so many seconds."""


def random_batch(
    shape: Shape, groups: int, *, frame_count: FrameCount, placeholder_id: int
) -> HostBatch:
    """A batch without padding; its recordings are noise. Raises TypeError for other shapes."""
    if isinstance(shape, DuplexShape):
        full = full_duplex_batch if shape.target_samples else full_duplex_stt_batch
        arrays: Any = full(shape, groups)
    elif isinstance(shape, BatchShape):
        arrays = full_batch(shape, groups, frame_count=frame_count, placeholder_id=placeholder_id)
    else:
        raise TypeError(f"no batches of {type(shape).__name__}")
    rng = np.random.default_rng(0)

    def noise(x: np.ndarray) -> np.ndarray:
        if x.dtype != np.float32:
            return x
        return np.broadcast_to(0.1 * rng.standard_normal(x.shape[1:], np.float32), x.shape)

    return HostBatch(arrays=arrays.map(noise), ids=(), bucket=shape.name)


def step_seconds(programs: Programs, state: RunState, batch: HostBatch, accumulate: int) -> float:
    """Median seconds of an optimizer step of `accumulate` such batches, after a first one.

    The learning rate is 0. The state's arrays are replaced.
    """

    def step() -> float:
        begin = time.perf_counter()
        if accumulate == 1:
            state.train_state, report = programs.train(state.train_state, state.frozen, batch, 0.0)
        else:
            sums: MicroSums | None = None
            for index in range(accumulate):
                sums = programs.accumulate(sums, state.train_state, state.frozen, batch, index)
            assert sums is not None
            state.train_state, report = programs.finish(state.train_state, sums, 0.0)
        jax.block_until_ready(report)
        return time.perf_counter() - begin

    step()
    times = [step()]
    while len(times) < RUNS and sum(times) < LONGEST_S:
        times.append(step())
    return statistics.median(times)
