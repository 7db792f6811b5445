"""Audio perception: waveforms -> frames of the LLM's width.

Log-mel front end, SpecAugment, FastConformer encoder, modality adapter, projection. The number of
frames is a pure function of the number of samples (`PerceptionConfig.frame_count`), so the host can
plan sequences before the device encodes any audio.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.stack import RematPolicy
from speechlm2_jax.perception.batch_norm import Statistics
from speechlm2_jax.perception.chunking import Chunking, chunk_rngs, join_chunks, split_chunks
from speechlm2_jax.perception.fastconformer import EncoderOutput, FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frames import Frames, is_within
from speechlm2_jax.perception.log_mel import LogMel, LogMelConfig
from speechlm2_jax.perception.modality_adapter import (
    READERS_OF_LAYERS,
    AdapterConfig,
    IdentityConfig,
    input_width,
    layers_read,
    make_adapter,
)
from speechlm2_jax.perception.spec_augment import SpecAugmentConfig, spec_augment
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import constrain

_DITHER_RNG, _SPEC_AUGMENT_RNG, _ENCODER_RNG, _ADAPTER_RNG = range(4)


@dataclass(frozen=True, kw_only=True)
class PerceptionConfig:
    """NeMo's `perception:` block, completed with the preprocessor and encoder of an ASR model."""

    TARGETS: ClassVar[tuple[str, ...]] = (
        "AudioPerceptionModule",
        "AudioTranscriptionPerceptionModule",
    )
    IGNORED: ClassVar[Mapping[str, str]] = {"asr": "the ASR model's file has it"}

    preprocessor: LogMelConfig
    encoder: FastConformerConfig
    modality_adapter: AdapterConfig
    output_dim: int
    """Width of the LLM, which overrides this value if there is an LLM (as in NeMo)."""
    spec_augment: SpecAugmentConfig | None = None
    encoder_chunk_size_seconds: float | None = None
    """Longer clips are encoded in separate chunks of this length; null: whole."""

    def __post_init__(self) -> None:
        adapter = self.modality_adapter
        seconds = self.encoder_chunk_size_seconds
        if seconds is not None and seconds <= 0:
            raise ValueError(f"encoder_chunk_size_seconds={seconds} must be positive, or null")
        if self.encoder.feat_in != self.preprocessor.features:
            raise ValueError(
                f"encoder.feat_in={self.encoder.feat_in} must be preprocessor.features="
                f"{self.preprocessor.features}"
            )
        key, given = input_width(adapter)
        if given is not None and given != self.encoder.width:
            raise ValueError(
                f"modality_adapter.{key}={given} must be the encoder's width {self.encoder.width}"
            )
        layers_read(adapter, self.encoder.n_layers)
        if isinstance(adapter, FastConformerConfig) and adapter.width != adapter.d_model:
            raise ValueError(
                f"modality_adapter.feat_out={adapter.feat_out} does not fit the projection from "
                f"d_model={adapter.d_model}; set feat_out to -1"
            )

    @classmethod
    def of_encoder(
        cls,
        preprocessor: LogMelConfig,
        encoder: FastConformerConfig,
        spec_augment: SpecAugmentConfig | None = None,
    ) -> "PerceptionConfig":
        """Makes the config of an ASR model's encoder: no adapter and no projection."""
        return cls(
            preprocessor=preprocessor,
            encoder=encoder,
            modality_adapter=IdentityConfig(),
            output_dim=encoder.width,
            spec_augment=spec_augment,
        )

    @property
    def is_projected(self) -> bool:
        """Whether a projection follows the adapter."""
        adapter = self.modality_adapter
        return isinstance(adapter, FastConformerConfig) or adapter.is_projected

    @property
    def layers_read(self) -> tuple[int, ...]:
        """Encoder layers that the adapter reads; () if it reads the encoder's output alone."""
        return layers_read(self.modality_adapter, self.encoder.n_layers)

    @property
    def adapter_width(self) -> int:
        """Width of the adapter's frames."""
        adapter = self.modality_adapter
        return self.encoder.width if isinstance(adapter, IdentityConfig) else adapter.width

    @property
    def output_width(self) -> int:
        """Width of the output frames."""
        return self.output_dim if self.is_projected else self.adapter_width

    def check_width(self, llm_width: int) -> None:
        """Raises ValueError, naming the key to set, unless the frames have the LLM's width."""
        if self.output_width == llm_width:
            return
        key = "output_dim"
        if isinstance(self.modality_adapter, IdentityConfig):
            key = "modality_adapter.d_model (which adds a projection)"
        elif isinstance(self.modality_adapter, READERS_OF_LAYERS):
            key = f"modality_adapter.{self.modality_adapter.WIDTH_KEY}"
        value = self.encoder.width if "d_model" in key else llm_width
        raise ValueError(
            f"perception outputs frames of width {self.output_width}, the LLM takes {llm_width}; "
            f"set model.perception.{key} to {value}"
        )

    @property
    def heads(self) -> dict[str, int]:
        """Numbers of attention heads, for checks of a mesh: encoder, and adapter if it attends."""
        heads = {"heads of the speech encoder": self.encoder.n_heads}
        if isinstance(self.modality_adapter, FastConformerConfig):
            heads["heads of the modality adapter"] = self.modality_adapter.n_heads
        if isinstance(self.modality_adapter, READERS_OF_LAYERS):
            heads |= self.modality_adapter.heads
        return heads

    @property
    def frame_samples(self) -> int:
        """Samples per output frame (with a Q-Former: per encoder frame)."""
        factor = self.encoder.subsampling_factor * self.modality_adapter.subsampling_factor
        return self.preprocessor.hop_samples * factor

    @property
    def token_equivalent_duration(self) -> float:
        """Seconds per output frame."""
        return self.frame_samples / self.preprocessor.sample_rate

    def frame_count(self, samples: int) -> int:
        """Counts the output frames of a clip of `samples` samples."""
        return sum(self.modality_adapter.frame_count(n) for n in self.encoded_counts(samples))

    def encoded_counts(self, samples: int) -> tuple[int, ...]:
        """Counts the encoder's frames of each chunk of a clip."""
        chunking = self.chunking
        chunks = (samples,) if chunking is None else chunking.chunks(samples)
        return tuple(self.encoder.frame_count(self.preprocessor.frame_count(n)) for n in chunks)

    @property
    def chunking(self) -> Chunking | None:
        """How clips are split into chunks for the encoder; None: not at all."""
        seconds = self.encoder_chunk_size_seconds
        return None if seconds is None else Chunking.of(seconds, self.preprocessor)

    def frame_capacity(self, samples: int) -> int:
        """Returns the time axis F of the output for an audio array [B, samples]."""
        return self.frame_count(samples)


@dataclass(frozen=True, kw_only=True)
class PerceptionModes:
    """Which components are in training mode. A fully frozen component stays in evaluation mode."""

    log_mel: bool = False
    """Dither. NeMo's models never train their front end."""
    spec_augment: bool = False
    encoder: bool = False
    adapter: bool = False
    nemo_exact: bool = False
    """Batch norm counts every frame of NeMo's padded batch, not only the real ones."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class PerceptionOutput:
    """Frames of the LLM's width, padded to F = config.frame_capacity(S), and their real lengths."""

    frames: Float[Array, "B F D"]
    lengths: Int[Array, " B"]
    statistics: Statistics
    """New batch-norm statistics by variable path below perception; empty in evaluation."""


class AudioPerception(nnx.Module):
    """Encodes clips into LLM-width frames. Only batch-norm statistics depend on the whole batch."""

    def __init__(self, config: PerceptionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.log_mel = LogMel(config.preprocessor)
        self.encoder = FastConformer(config.encoder, rngs=rngs)
        self.adapter = make_adapter(config.modality_adapter, rngs=rngs)
        self.projection = (
            Linear(config.adapter_width, config.output_dim, axes=(None, "embed"), rngs=rngs)
            if config.is_projected
            else None
        )

    def __call__(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        *,
        modes: PerceptionModes = PerceptionModes(),
        rngs: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
        dtype: DTypeLike = jnp.float32,
        remat: RematPolicy = "full",
    ) -> PerceptionOutput:
        """Encodes clips of `lengths` samples; a clip of length 0 is padding.

        `rngs`: one key per clip, for the components that `modes` puts in training mode. `extents`:
        the padded length, in samples, of each clip's batch in NeMo (needed by `modes.nemo_exact`).
        Activations after the mel features have `dtype`. `remat` applies to the encoder's layers.
        """
        if modes.nemo_exact and extents is None:
            raise ValueError("nemo_exact needs `extents`: the samples of each group's longest clip")
        extents = extents if modes.nemo_exact else None
        run = partial(self._encode, modes=modes, dtype=dtype, remat=remat)
        chunking = self.config.chunking
        if chunking is None:
            return run(audio, lengths, rngs=rngs, extents=extents)
        if audio.shape[1] <= chunking.size:  # one chunk, with the random draws of a first chunk
            return run(audio, lengths, rngs=chunk_rngs(rngs, 1), extents=extents)
        chunk_audio, chunk_lengths = split_chunks(audio, lengths, chunking)
        batch, chunks, width = chunk_audio.shape
        if extents is not None:  # NeMo pads all chunks of a batch to the longest
            longest = jnp.where(extents > chunking.size, jnp.max(chunk_lengths), extents)
            extents = jnp.repeat(longest, chunks)
        output = run(
            constrain(chunk_audio.reshape(batch * chunks, width), "clips", None),
            chunk_lengths.reshape(-1),
            rngs=chunk_rngs(rngs, chunks),
            extents=extents,
        )
        frames, lengths = join_chunks(
            output.frames.reshape(batch, chunks, *output.frames.shape[1:]),
            output.lengths.reshape(batch, chunks),
            last=chunking.whole_chunks(lengths),
            frames_per_chunk=self.config.frame_count(chunking.size),
            capacity=self.config.frame_capacity(audio.shape[1]),
        )
        return PerceptionOutput(
            frames=constrain(frames, "clips", "frames", "act_embed"),
            lengths=lengths,
            statistics=output.statistics,
        )

    def _encode(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        *,
        modes: PerceptionModes,
        rngs: Key[Array, " B"] | None,
        extents: Int[Array, " B"] | None,
        dtype: DTypeLike,
        remat: RematPolicy,
    ) -> PerceptionOutput:
        """Encodes clips, or chunks of them, without further splitting."""
        features, extents = self._front_end(audio, lengths, modes, rngs, extents)
        return self.encode(
            features,
            self.config.frame_capacity(audio.shape[1]),
            modes=modes,
            rngs=rngs,
            extents=extents,
            dtype=dtype,
            remat=remat,
        )

    def encoder_output(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        *,
        modes: PerceptionModes = PerceptionModes(),
        rngs: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Frames:
        """Encodes clips without adapter and projection: what a decoder of an ASR model reads.

        The arguments are those of `__call__`, and random draws are the same. Clips are not split.
        """
        extents = extents if modes.nemo_exact else None
        features, extents = self._front_end(audio, lengths, modes, rngs, extents)
        encoded = self._run_encoder(features, modes, rngs, extents, dtype, "none")
        return Frames(frames=encoded.frames, lengths=encoded.lengths)

    def _front_end(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        modes: PerceptionModes,
        rngs: Key[Array, " B"] | None,
        extents: Int[Array, " B"] | None,
    ) -> tuple[Frames, Int[Array, " B"] | None]:
        """Computes log-mel frames, and extents in them; `modes` turn dither and SpecAugment on."""
        audio = jnp.where(is_within(lengths, audio.shape[1]), audio, 0.0)
        dither_rngs = fold_rngs(rngs, _DITHER_RNG) if modes.log_mel else None
        features = self.log_mel(audio, lengths, rngs=dither_rngs)
        if extents is not None:
            extents = jnp.where(lengths > 0, self.log_mel.frame_extents(extents), 0)
        mask_rngs = fold_rngs(rngs, _SPEC_AUGMENT_RNG)
        if modes.spec_augment and self.config.spec_augment is not None and mask_rngs is not None:
            masked = spec_augment(features, self.config.spec_augment, mask_rngs)
            features = Frames(frames=masked, lengths=features.lengths)
        return features, extents

    def _run_encoder(
        self,
        features: Frames,
        modes: PerceptionModes,
        rngs: Key[Array, " B"] | None,
        extents: Int[Array, " B"] | None,
        dtype: DTypeLike,
        remat: RematPolicy,
    ) -> EncoderOutput:
        return self.encoder(
            features.frames.astype(dtype),
            features.lengths,
            train=modes.encoder,
            rngs=fold_rngs(rngs, _ENCODER_RNG) if modes.encoder else None,
            extents=extents,
            capture=self.config.layers_read,
            remat=remat,
        )

    def encode(
        self,
        features: Frames,
        capacity: int,
        *,
        modes: PerceptionModes = PerceptionModes(),
        rngs: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
        dtype: DTypeLike = jnp.float32,
        remat: RematPolicy = "full",
    ) -> PerceptionOutput:
        """Encodes mel features into `capacity` frames per clip: `__call__` without the front end.

        `extents` are mel frames here, 0 for clips of length 0.
        """
        encoded = self._run_encoder(features, modes, rngs, extents, dtype, remat)
        adapted = self.adapter(
            self.adapter_inputs(encoded.frames, encoded.captured),
            encoded.lengths,
            train=modes.adapter,
            rngs=fold_rngs(rngs, _ADAPTER_RNG) if modes.adapter else None,
            extents=encoded.extents,
        )
        # truncate last: until here NeMo's batch norm counts the frames beyond a clip too
        frames = adapted.frames[:, :capacity]
        if self.projection is not None:
            frames = self.projection(frames)
        return PerceptionOutput(
            frames=constrain(frames, "clips", "frames", "act_embed"),
            lengths=adapted.lengths,
            statistics={
                f"{name}.{path}": value
                for name, output in (("encoder", encoded), ("adapter", adapted))
                for path, value in output.statistics.items()
            },
        )

    def adapter_inputs(
        self, frames: Float[Array, "B T D"], captured: Float[Array, "B K T D"] | None
    ) -> Float[Array, "B *K T D"]:
        """Selects the adapter's input: the encoder's output, or K of its layers [B, K, T, D]."""
        adapter = self.config.modality_adapter
        if not isinstance(adapter, READERS_OF_LAYERS) or captured is None:
            return frames
        if not adapter.include_final_output:
            return captured
        return jnp.concatenate([captured, frames[:, None]], axis=1)
