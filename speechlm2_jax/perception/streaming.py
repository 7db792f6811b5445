"""Perception of a stream: audio in steps of one size in, LLM-width frames out.

```python
plan = StreamPlan(config=config, frames=natural_frames(config))
step = make_step(graphdef, plan)                  # compiled once; its state is donated
stream = start_stream(plan, batch=1)
heard, stream = step(variables, stream, audio)      # audio [B, plan.samples]
heard.frames, heard.is_real                         # [B, frames, W], [B, frames]
```

All real frames of all steps, one after the other, are those of one pass over the whole clip. A
stream's state is all zeros where it begins, so that any row begins anew by being set to zero
(`restart`). State in, state out: sessions, batches of sessions and compiled loops hold it as they
like.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.perception import encoder_stream, mel_stream
from speechlm2_jax.perception.encoder_stream import EncoderPlan, EncoderStreamState, StreamFrames
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import Context, FastConformerConfig
from speechlm2_jax.perception.mel_stream import MelPlan
from speechlm2_jax.perception.perception import AudioPerception, PerceptionConfig
from speechlm2_jax.perception.qformer import QformerConfig


def natural_frames(config: PerceptionConfig, context: Context | None = None) -> int:
    """Output frames of the shortest step that holds whole chunks of attention: it adds no delay."""
    adapter, factor = config.modality_adapter, config.modality_adapter.subsampling_factor
    chunk = _chunk(config.encoder, context)
    own = _chunk(adapter, None) if isinstance(adapter, FastConformerConfig) else 1
    return math.lcm(chunk // math.gcd(chunk, factor), own)


def _chunk(config: FastConformerConfig, context: Context | None) -> int:
    right = (context or config.contexts[0])[1]
    return right + 1 if config.att_context_style == "chunked_limited" else 1


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Static sizes of streams through perception.

    Raises ValueError for what cannot be streamed, naming the setting.
    """

    config: PerceptionConfig
    frames: int
    """Output frames of a step; steps that cut a chunk of attention make each layer wait for it."""
    context: Context | None = None
    """The encoder's attention context; by default the first of its `att_context_size`."""
    longest: int | None = None
    """Encoder frames that are remembered where a left context has no bound."""

    def __post_init__(self) -> None:
        if self.config.encoder_chunk_size_seconds is not None:
            raise ValueError("a stream is not cut: set encoder_chunk_size_seconds to null")
        if isinstance(self.config.modality_adapter, QformerConfig):
            raise ValueError("a Q-Former looks at whole clips; it cannot be streamed")
        if self.config.layers_read and self.encoder.layer_delay:
            raise ValueError(
                "an adapter that reads several layers needs an encoder that does not look ahead: "
                "conv_context_size causal, and steps of whole chunks of attention"
            )
        _ = (self.mel, self.encoder, self.adapter)  # each refuses what it cannot do

    @property
    def encoded(self) -> int:
        """Encoder frames of a step."""
        return self.frames * self.config.modality_adapter.subsampling_factor

    @property
    def mel(self) -> MelPlan:
        """The front end's part."""
        factor = self.config.encoder.subsampling_factor
        return MelPlan(config=self.config.preprocessor, frames=self.encoded * factor)

    @property
    def encoder(self) -> EncoderPlan:
        """The encoder's part."""
        encoder = self.config.encoder
        return EncoderPlan(
            config=encoder,
            frames=self.encoded,
            lead=self.mel.lead,
            context=self.context or encoder.contexts[0],
            longest=self.longest,
        )

    @property
    def adapter(self) -> EncoderPlan | None:
        """A Conformer adapter's part."""
        adapter = self.config.modality_adapter
        if not isinstance(adapter, FastConformerConfig):
            return None
        return EncoderPlan(
            config=adapter,
            frames=self.frames,
            lead=self.encoder.delay,
            context=adapter.contexts[0],
            longest=self.longest,
        )

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.mel.samples

    @property
    def delay(self) -> int:
        """Frames by which output is late: step s gives frames s x `frames` - delay and on."""
        return self.encoder.delay if self.adapter is None else self.adapter.delay

    def frames_out(self, steps: int, samples: int) -> int:
        """Counts the real frames that `steps` steps have given of a stream of `samples` samples."""
        return max(0, min(steps * self.frames - self.delay, self.config.frame_count(samples)))

    def steps_for(self, samples: int) -> int:
        """Counts the steps until all frames of a stream of `samples` samples are out."""
        frames = self.config.frame_count(samples)
        return -(-(frames + self.delay) // self.frames) if frames else 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StreamState:
    """Where a batch of streams stands; all zeros where one begins."""

    steps: Any
    """Int32 [B]: steps so far."""
    total: Any
    """Int32 [B]: real samples so far."""
    wave: Any
    """Float32 [B, C]: the last samples."""
    encoder: EncoderStreamState
    adapter: EncoderStreamState | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StreamOutput:
    """Output frames of one step."""

    frames: Float[Array, "B F W"]
    is_real: Bool[Array, "B F"]
    """False for places before the beginning or past the end of a stream."""


def start_stream(plan: StreamPlan, batch: int, dtype: DTypeLike = jnp.float32) -> StreamState:
    """Makes `batch` streams that have not begun; activations have `dtype`."""
    return StreamState(
        steps=jnp.zeros(batch, jnp.int32),
        total=jnp.zeros(batch, jnp.int32),
        wave=jnp.zeros((batch, plan.mel.carry)),
        encoder=encoder_stream.new_state(plan.encoder, batch, dtype),
        adapter=None
        if plan.adapter is None
        else encoder_stream.new_state(plan.adapter, batch, dtype),
    )


def restart(stream: StreamState, restarted: Bool[Array, " B"]) -> StreamState:
    """Begins the streams in `restarted` anew; the others go on."""

    def clear(x: Array, axis: int) -> Array:
        shape = [1] * x.ndim
        shape[axis] = restarted.shape[0]
        return jnp.where(restarted.reshape(shape), jnp.zeros((), x.dtype), x)

    def clear_state(m: EncoderStreamState | None) -> EncoderStreamState | None:
        if m is None:
            return None
        stacked = {name: clear(getattr(m, name), 1) for name in EncoderStreamState.STACKED}
        return EncoderStreamState(inputs=tuple(clear(x, 0) for x in m.inputs), **stacked)

    first = {name: clear(getattr(stream, name), 0) for name in ("steps", "total", "wave")}
    encoder = clear_state(stream.encoder)
    assert encoder is not None
    return StreamState(encoder=encoder, adapter=clear_state(stream.adapter), **first)


def advance(
    perception: AudioPerception,
    plan: StreamPlan,
    stream: StreamState,
    audio: Float[Array, "B S"],
    new: Int[Array, " B"] | None = None,
) -> tuple[StreamOutput, StreamState]:
    """Hears the next `plan.samples` samples of each stream.

    `new` says how many of them are real, from the first; fewer than all end the stream, and further
    steps with 0 bring out its last frames. By default all are.
    """
    new = jnp.full(stream.steps.shape, plan.samples, jnp.int32) if new is None else new
    total, steps = stream.total + new, stream.steps
    mel, wave = mel_stream.advance(perception.log_mel, plan.mel, stream.wave, audio, steps, total)
    encoded, encoder = encoder_stream.advance(
        perception.encoder,
        plan.encoder,
        stream.encoder,
        mel.astype(stream.encoder.keys.dtype),
        steps,
        perception.log_mel.frame_lengths(total),
        capture=plan.config.layers_read,
    )
    adapter = stream.adapter
    if plan.adapter is not None and adapter is not None:
        assert isinstance(perception.adapter, FastConformer)
        encoded, adapter = encoder_stream.advance(
            perception.adapter, plan.adapter, adapter, encoded.frames, steps, encoded.lengths
        )
    else:
        encoded = _adapted(perception, encoded)
    frames = encoded.frames
    if perception.projection is not None:
        frames = perception.projection(frames)
    stream = StreamState(steps=steps + 1, total=total, wave=wave, encoder=encoder, adapter=adapter)
    return StreamOutput(frames=frames, is_real=encoded.is_real), stream


def _adapted(perception: AudioPerception, encoded: StreamFrames) -> StreamFrames:
    """What an adapter that looks at each frame by itself makes of them."""
    adapter_inputs = perception.adapter_inputs(encoded.frames, encoded.captured)
    frames = perception.adapter(adapter_inputs, encoded.lengths).frames
    return replace(encoded, frames=frames, captured=None)


Step = Callable[..., tuple[StreamOutput, StreamState]]


def make_step(graphdef: Any, plan: StreamPlan) -> Step:
    """Compiles `step(variables, stream, audio, new=None)` of a perception module, state donated."""

    def step(
        variables: Variables,
        stream: StreamState,
        audio: Float[Array, "B S"],
        new: Int[Array, " B"] | None = None,
    ) -> tuple[StreamOutput, StreamState]:
        return advance(merge(graphdef, variables), plan, stream, audio, new)

    return jax.jit(step, donate_argnums=1)
