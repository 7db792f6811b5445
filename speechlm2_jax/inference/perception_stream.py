"""User-facing streaming perception: push samples, get encoder frames."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.layers.module import Variables, abstract, describe, split
from speechlm2_jax.perception.perception import AudioPerception, PerceptionConfig
from speechlm2_jax.perception.streaming import (
    StreamPlan,
    StreamState,
    make_step,
    natural_frames,
    restart,
    start_stream,
)


class PerceptionStream:
    """Encodes a batch of audio streams chunk by chunk with one compiled program.

    The concatenated frames of all chunks equal the frames of `model.perception` on the whole audio.
    `state` holds the streams' caches. It may be read, and set to an earlier copy. `push` donates
    it: arrays of the old state cannot be used afterwards, so copy them first.
    """

    def __init__(
        self,
        plan: StreamPlan,
        graphdef: nnx.GraphDef[AudioPerception],
        variables: Variables,
        batch: int,
        dtype: DTypeLike,
    ):
        self.plan = plan
        self.state: StreamState = start_stream(plan, batch, dtype)
        self._variables = variables
        self._step = make_step(graphdef, plan)

    @classmethod
    def of_model(
        cls,
        config: PerceptionConfig,
        variables: Variables,
        batch: int,
        dtype: DTypeLike,
        *,
        frames: int | None,
        context: tuple[int, int] | None,
        longest: int | None,
    ) -> "PerceptionStream":
        """The streams of a model whose `variables` hold the module below `perception`.

        See `Perceiving.perception_stream` for the options. Raises ValueError for a module that
        needs whole clips.
        """
        plan = StreamPlan(
            config=config,
            frames=frames or natural_frames(config, context),
            context=context,
            longest=longest,
        )
        module = abstract(lambda rngs: AudioPerception(config, rngs=rngs))
        own = {path: variables[f"perception.{path}"] for path in describe(module)}
        return cls(plan, split(module)[0], own, batch, dtype)

    def push(
        self, audio: ArrayLike, new: ArrayLike | None = None
    ) -> tuple[Float[Array, "B F W"], Bool[Array, "B F"]]:
        """Encodes `plan.samples` samples of each stream. Returns frames and which of them are real.

        `audio` is [B, plan.samples]. `new` [B] is the number of real samples of each stream; None:
        all are real. A stream ends with the first push whose `new` is less than `plan.samples`.
        To get its last frames, push zeros with `new` 0. `plan.steps_for(samples)` is the number of
        pushes in all. Raises ValueError for another number of samples.
        """
        samples = jnp.asarray(audio, jnp.float32)
        expected = (self.state.wave.shape[0], self.plan.samples)
        if samples.shape != expected:
            raise ValueError(f"audio has shape {samples.shape}; push {expected} (plan.samples)")
        count = None if new is None else jnp.asarray(new, jnp.int32)
        output, self.state = self._step(self._variables, self.state, samples, count)
        return output.frames, output.is_real

    def restart(self, rows: ArrayLike) -> None:
        """Resets the state of the streams in `rows` (bool [B])."""
        self.state = restart(self.state, jnp.asarray(rows, bool))
