"""Streaming perception: fixed-size steps of audio in, LLM-width frames out.

```python
plan = StreamPlan(config=config, frames=natural_frames(config))
step = make_step(graphdef, plan)                    # compiled once; its state is donated
stream = start_stream(plan, batch=1)
output, stream = step(variables, stream, audio)     # audio [B, plan.samples]
output.frames, output.is_real                       # [B, frames, W], [B, frames]
```

A step is one such call. The real frames of all steps, concatenated, equal one pass over the whole
clip. The state of a new stream is all zeros, so `restart` zeroes the streams to restart. A step is
a pure function (state in, state out): sessions, batches of sessions and compiled loops can hold
the state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.perception import encoder_stream, mel_stream
from speechlm2_jax.perception.encoder_plan import EncoderPlan
from speechlm2_jax.perception.encoder_stream import EncoderStreamState, StreamFrames
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import Context, FastConformerConfig
from speechlm2_jax.perception.mel_stream import MelPlan
from speechlm2_jax.perception.perception import AudioPerception, PerceptionConfig
from speechlm2_jax.perception.qformer import QformerConfig
from speechlm2_jax.pytrees import register_pytree


def natural_frames(config: PerceptionConfig, context: Context | None = None) -> int:
    """Returns the fewest output frames per step such that a step is whole attention chunks."""
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

    Raises ValueError, naming the setting, if the model cannot stream.
    """

    config: PerceptionConfig
    frames: int
    """Output frames per step. A step that splits an attention chunk adds delay in each layer."""
    context: Context | None = None
    """The encoder's attention context; default: the first of its `att_context_size`."""
    longest: int | None = None
    """Length of the KV cache, in encoder frames, if the left context is unbounded."""

    def __post_init__(self) -> None:
        if self.config.encoder_chunk_size_seconds is not None:
            raise ValueError(
                "encoder_chunk_size_seconds: not supported in a stream; set it to null"
            )
        if isinstance(self.config.modality_adapter, QformerConfig):
            raise ValueError("modality_adapter: a Q-Former needs whole clips; it cannot stream")
        if self.config.layers_read and self.encoder.layer_delay:
            raise ValueError(
                "modality_adapter: a stream with an adapter over several layers needs an encoder "
                "that does not look ahead: causal convolutions, steps of whole attention chunks"
            )
        _ = self.mel  # raises ValueError if it cannot stream
        for block, plan in (("encoder", "encoder"), ("modality_adapter", "adapter")):
            try:
                getattr(self, plan)
            except ValueError as error:
                raise ValueError(f"{block}.{error}") from error

    @property
    def encoded(self) -> int:
        """Encoder frames per step."""
        return self.frames * self.config.modality_adapter.subsampling_factor

    @property
    def mel(self) -> MelPlan:
        """Plan of the mel front end."""
        factor = self.config.encoder.subsampling_factor
        return MelPlan(config=self.config.preprocessor, frames=self.encoded * factor)

    @property
    def encoder(self) -> EncoderPlan:
        """Plan of the encoder."""
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
        """Plan of a Conformer adapter; None for the others."""
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
        """Samples per step."""
        return self.mel.samples

    @property
    def delay(self) -> int:
        """Delay of the output in frames: step s gives the frames from s * `frames` - delay on."""
        return self.encoder.delay if self.adapter is None else self.adapter.delay

    def frames_out(self, steps: int, samples: int) -> int:
        """Counts the real frames after `steps` steps of a stream of `samples` samples."""
        return max(0, min(steps * self.frames - self.delay, self.config.frame_count(samples)))

    def steps_for(self, samples: int) -> int:
        """Counts the steps after which all frames of a stream of `samples` samples are out."""
        frames = self.config.frame_count(samples)
        return -(-(frames + self.delay) // self.frames) if frames else 0


@register_pytree
@dataclass(frozen=True, kw_only=True)
class StreamState:
    """State of a batch of streams; all zeros for a new stream."""

    steps: Int[Array, " B"]
    """Int32 [B]: steps done."""
    total: Int[Array, " B"]
    """Int32 [B]: real samples so far."""
    wave: Float[Array, "B C"]
    """Float32 [B, C]: the last samples."""
    encoder: EncoderStreamState
    adapter: EncoderStreamState | None


@register_pytree
@dataclass(frozen=True, kw_only=True)
class StreamOutput:
    """Output frames of one step."""

    frames: Float[Array, "B F W"]
    is_real: Bool[Array, "B F"]
    """False before the start and past the end of a stream."""


def start_stream(plan: StreamPlan, batch: int, dtype: DTypeLike = jnp.float32) -> StreamState:
    """Makes the state of `batch` new streams; activations have `dtype`."""
    return StreamState(
        steps=jnp.zeros(batch, jnp.int32),
        total=jnp.zeros(batch, jnp.int32),
        wave=jnp.zeros((batch, plan.mel.carry)),
        encoder=encoder_stream.new_state(plan.encoder, batch, dtype),
        adapter=None
        if plan.adapter is None
        else encoder_stream.new_state(plan.adapter, batch, dtype),
    )


def keep_where(is_kept: Bool[Array, " B"], old: StreamState, new: StreamState) -> StreamState:
    """The old states of the streams where `is_kept` is True, and the new ones of the others."""

    def chosen(old: Array, new: Array, axis: int) -> Array:
        shape = [1] * old.ndim
        shape[axis] = is_kept.shape[0]
        return jnp.where(is_kept.reshape(shape), old, new)

    def chosen_state(
        old: EncoderStreamState | None, new: EncoderStreamState | None
    ) -> EncoderStreamState | None:
        if old is None or new is None:
            return None
        stacked = {n: chosen(getattr(old, n), getattr(new, n), 1) for n in old.STACKED}
        pairs = zip(old.inputs, new.inputs, strict=True)
        return EncoderStreamState(inputs=tuple(chosen(*pair, 0) for pair in pairs), **stacked)

    names = ("steps", "total", "wave")
    first = {name: chosen(getattr(old, name), getattr(new, name), 0) for name in names}
    encoder = chosen_state(old.encoder, new.encoder)
    assert encoder is not None
    return StreamState(encoder=encoder, adapter=chosen_state(old.adapter, new.adapter), **first)


def restart(stream: StreamState, restarted: Bool[Array, " B"]) -> StreamState:
    """Resets the streams where `restarted` is True; the others continue."""
    return keep_where(~restarted, stream, jax.tree.map(jnp.zeros_like, stream))


def advance(
    perception: AudioPerception,
    plan: StreamPlan,
    stream: StreamState,
    audio: Float[Array, "B S"],
    new: Int[Array, " B"] | None = None,
) -> tuple[StreamOutput, StreamState]:
    """Encodes the next `plan.samples` samples of each stream.

    `new` counts the real ones among them (default: all). Fewer than all end the stream; further
    steps with `new` = 0 flush its last frames.
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
    """Applies an adapter that treats each frame by itself."""
    adapter_inputs = perception.adapter_inputs(encoded.frames, encoded.captured)
    frames = perception.adapter(adapter_inputs, encoded.lengths).frames
    return replace(encoded, frames=frames, captured=None)


Step = Callable[..., tuple[StreamOutput, StreamState]]


def make_step(graphdef: nnx.GraphDef[AudioPerception], plan: StreamPlan) -> Step:
    """Compiles `step(variables, stream, audio, new=None)`, which donates `stream`."""

    def step(
        variables: Variables,
        stream: StreamState,
        audio: Float[Array, "B S"],
        new: Int[Array, " B"] | None = None,
    ) -> tuple[StreamOutput, StreamState]:
        return advance(merge(graphdef, variables), plan, stream, audio, new)

    return jax.jit(step, donate_argnums=1)
