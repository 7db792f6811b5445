"""User-facing streaming perception: push samples, get encoder frames."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from speechlm2_jax.layers.module import Variables
from speechlm2_jax.perception.streaming import (
    StreamPlan,
    StreamState,
    make_step,
    restart,
    start_stream,
)


class PerceptionStream:
    """Encodes a batch of audio streams chunk by chunk with one compiled program.

    The frames of all chunks, concatenated, are those of `model.perception` on the whole audio.
    `state` holds the streams' caches. It may be saved and set again, but `push` donates it: the
    arrays that went in cannot be used afterwards.
    """

    def __init__(
        self, plan: StreamPlan, graphdef: Any, variables: Variables, batch: int, dtype: DTypeLike
    ):
        self.plan = plan
        self.state: StreamState = start_stream(plan, batch, dtype)
        self._variables = variables
        self._step = make_step(graphdef, plan)

    def push(self, audio: Any, new: Any = None) -> tuple[Float[Array, "B F W"], Bool[Array, "B F"]]:
        """Encodes `plan.samples` samples of each stream: (frames, which of them are real).

        `audio` [B, plan.samples]. `new` [B] is the number of real samples of each; the rest is
        padding and ends the stream. Then push zeros with `new` 0 to get its last frames
        (`plan.steps_for(samples)` pushes in all). Raises ValueError for another number of samples.
        """
        samples = jnp.asarray(audio, jnp.float32)
        expected = (self.state.wave.shape[0], self.plan.samples)
        if samples.shape != expected:
            raise ValueError(f"audio has shape {samples.shape}; push {expected} (plan.samples)")
        count = None if new is None else jnp.asarray(new, jnp.int32)
        output, self.state = self._step(self._variables, self.state, samples, count)
        return output.frames, output.is_real

    def restart(self, rows: Any) -> None:
        """Resets the state of the streams in `rows` (bool [B])."""
        self.state = restart(self.state, jnp.asarray(rows, bool))
