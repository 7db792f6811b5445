"""Perception of a model over streams, as a user holds it: push samples, get frames."""

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
    """A batch of streams that a model's perception hears, step by step, on one compiled program.

    All frames that come out, one step's after the other's, are those of `model.perception` on the
    whole audio. `state` is what the streams have behind them: it may be kept aside and put back,
    but each step consumes the one that it is given (its memory is used again).
    """

    def __init__(
        self, plan: StreamPlan, graphdef: Any, variables: Variables, batch: int, dtype: DTypeLike
    ):
        self.plan = plan
        self.state: StreamState = start_stream(plan, batch, dtype)
        self._variables = variables
        self._step = make_step(graphdef, plan)

    def push(self, audio: Any, new: Any = None) -> tuple[Float[Array, "B F W"], Bool[Array, "B F"]]:
        """Hears `plan.samples` samples of each stream: (frames, which of them are real).

        `audio` [B, plan.samples]. `new` [B] says how many samples of each are real, from the first:
        fewer than all end a stream; push zeros with `new` 0 to bring out its last frames
        (`plan.steps_for(samples)` steps in all). Raises ValueError for another number of samples.
        """
        samples = jnp.asarray(audio, jnp.float32)
        expected = (self.state.wave.shape[0], self.plan.samples)
        if samples.shape != expected:
            raise ValueError(f"audio has shape {samples.shape}; push {expected} (plan.samples)")
        count = None if new is None else jnp.asarray(new, jnp.int32)
        heard, self.state = self._step(self._variables, self.state, samples, count)
        return heard.frames, heard.is_real

    def restart(self, rows: Any) -> None:
        """Begins the streams in `rows` (bool [B]) anew."""
        self.state = restart(self.state, jnp.asarray(rows, bool))
