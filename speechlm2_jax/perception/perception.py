"""Audio perception: waveforms -> frames of the LLM's width.

Log-mel front end, SpecAugment, FastConformer encoder, modality adapter, projection; the frames
that a clip makes are a pure function of its samples (`PerceptionConfig.frame_count`), so that the
host lays out sequences before the device has seen any audio.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.stack import RematPolicy
from speechlm2_jax.perception.batch_norm import Statistics
from speechlm2_jax.perception.chunking import Chunking, chunk_rngs, join_chunks, split_chunks
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frames import Frames, is_within
from speechlm2_jax.perception.log_mel import LogMel, LogMelConfig
from speechlm2_jax.perception.modality_adapter import (
    READERS_OF_LAYERS,
    AdapterConfig,
    IdentityConfig,
    MultiLayerConfig,
    layers_read,
    make_adapter,
)
from speechlm2_jax.perception.qformer import QformerConfig
from speechlm2_jax.perception.spec_augment import SpecAugmentConfig, spec_augment
from speechlm2_jax.sharding import constrain

_DITHER_RNG, _SPEC_AUGMENT_RNG, _ENCODER_RNG, _ADAPTER_RNG = range(4)


@dataclass(frozen=True, kw_only=True)
class PerceptionConfig:
    """NeMo's `perception:` block, completed with the preprocessor and encoder of an ASR model."""

    TARGETS: ClassVar[tuple[str, ...]] = ("AudioPerceptionModule",)

    preprocessor: LogMelConfig
    encoder: FastConformerConfig
    modality_adapter: AdapterConfig
    output_dim: int
    """Width of the LLM; where there is one, it sets this, whatever is written here (as in NeMo)."""
    spec_augment: SpecAugmentConfig | None = None
    encoder_chunk_size_seconds: float | None = None
    """Longer clips are encoded in parts of this length, each by itself; null: whole."""

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
        key, given = _input_width(adapter)
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
        """An encoder by itself, as a recogniser has it: no adapter, its frames not projected."""
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
        """Encoder layers that the adapter sees; none where it sees the encoder's output alone."""
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
        """Raises ValueError, naming the key that decides, unless frames are of the LLM's width."""
        if self.output_width == llm_width:
            return
        key = "output_dim"
        if isinstance(self.modality_adapter, IdentityConfig):
            key = "modality_adapter.d_model (which adds a projection)"
        elif isinstance(self.modality_adapter, READERS_OF_LAYERS):
            key = f"modality_adapter.{self.modality_adapter.WIDTH_KEY}"
        value = self.encoder.width if "d_model" in key else llm_width
        raise ValueError(
            f"perception gives frames of width {self.output_width} but the LLM takes {llm_width}; "
            f"set model.perception.{key} to {value}"
        )

    @property
    def heads(self) -> dict[str, int]:
        """Attention heads of the encoder and of an adapter that attends."""
        heads = {"heads of the speech encoder": self.encoder.n_heads}
        if isinstance(self.modality_adapter, FastConformerConfig):
            heads["heads of the modality adapter"] = self.modality_adapter.n_heads
        if isinstance(self.modality_adapter, READERS_OF_LAYERS):
            heads |= self.modality_adapter.heads
        return heads

    @property
    def frame_samples(self) -> int:
        """Samples that one output frame stands for (with a Q-Former: one encoder frame)."""
        factor = self.encoder.subsampling_factor * self.modality_adapter.subsampling_factor
        return self.preprocessor.hop_samples * factor

    @property
    def token_equivalent_duration(self) -> float:
        """Seconds of audio that one output frame stands for."""
        return self.frame_samples / self.preprocessor.sample_rate

    def frame_count(self, samples: int) -> int:
        """Counts the output frames of a clip of `samples` samples."""
        return sum(self.modality_adapter.frame_count(n) for n in self.encoded_counts(samples))

    def encoded_counts(self, samples: int) -> tuple[int, ...]:
        """Counts the encoder's frames of each part of a clip that it sees by itself."""
        chunking = self.chunking
        chunks = (samples,) if chunking is None else chunking.chunks(samples)
        return tuple(self.encoder.frame_count(self.preprocessor.frame_count(n)) for n in chunks)

    @property
    def chunking(self) -> Chunking | None:
        """How clips are cut for the encoder; None: they are not."""
        seconds = self.encoder_chunk_size_seconds
        return None if seconds is None else Chunking.of(seconds, self.preprocessor)

    def frame_capacity(self, samples: int) -> int:
        """Frames of the output array for an audio array of `samples`: those of a full clip."""
        return self.frame_count(samples)


def _input_width(adapter: AdapterConfig) -> tuple[str, int | None]:
    """The width of frames that an adapter wants, None for any, and the key that says it."""
    if isinstance(adapter, QformerConfig):
        return "encoder_config.d_model", adapter.input_width
    if isinstance(adapter, MultiLayerConfig):
        return "input_dim", adapter.input_width
    if isinstance(adapter, FastConformerConfig):
        return "feat_in", adapter.feat_in
    return "d_model", adapter.d_model if adapter.is_projected else None


@dataclass(frozen=True, kw_only=True)
class PerceptionModes:
    """Which parts are in training mode. A part whose parameters are all frozen stays out of it."""

    log_mel: bool = False
    """Dither. NeMo's models never train their front end."""
    spec_augment: bool = False
    encoder: bool = False
    adapter: bool = False
    nemo_exact: bool = False
    """Batch norm counts every frame that NeMo's padded batch would have, not only real ones."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PerceptionOutput:
    """Frames of the LLM's width [B, F, D] with F = config.frame_capacity(S), and their number."""

    frames: Float[Array, "B F D"]
    lengths: Int[Array, " B"]
    statistics: Statistics
    """New batch-norm statistics by variable path below perception; empty in evaluation."""


class AudioPerception(nnx.Module):
    """Encodes clips into LLM-width frames; clips share nothing but batch-norm statistics."""

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
        """Encodes clips of `lengths` samples; one of length 0 is an empty slot.

        `rngs`, one per clip, feed the random parts that `modes` puts in training. `extents`, in
        samples, is the padded length of each clip's batch in NeMo (`modes.nemo_exact` needs it).
        Activations after the mel features have `dtype`; `remat` is that of the encoder's layers.
        """
        if modes.nemo_exact and extents is None:
            raise ValueError("nemo_exact needs `extents`: the longest clip of each group")
        extents = extents if modes.nemo_exact else None
        run = partial(self._encode, modes=modes, dtype=dtype, remat=remat)
        chunking = self.config.chunking
        if chunking is None:
            return run(audio, lengths, rngs=rngs, extents=extents)
        if audio.shape[1] <= chunking.size:  # whole, with the draws of a first part
            return run(audio, lengths, rngs=chunk_rngs(rngs, 1), extents=extents)
        chunk_audio, chunk_lengths = split_chunks(audio, lengths, chunking)
        batch, chunks, width = chunk_audio.shape
        if extents is not None:  # NeMo pads all parts of a batch to the longest
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
        """Encodes clips, or parts of them, each as a whole."""
        audio = jnp.where(is_within(lengths, audio.shape[1]), audio, 0.0)
        features = self._features(audio, lengths, modes, rngs)
        frame_extents = None
        if extents is not None:
            frame_extents = jnp.where(lengths > 0, self.log_mel.frame_extents(extents), 0)
        return self.encode(
            features,
            self.config.frame_capacity(audio.shape[1]),
            modes=modes,
            rngs=rngs,
            extents=frame_extents,
            dtype=dtype,
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
        """Encodes mel features into `capacity` frames per clip; the second half of a call.

        `extents` count mel frames here, already 0 for empty slots.
        """
        encoded = self.encoder(
            features.frames.astype(dtype),
            features.lengths,
            train=modes.encoder,
            rngs=fold_rngs(rngs, _ENCODER_RNG) if modes.encoder else None,
            extents=extents,
            capture=self.config.layers_read,
            remat=remat,
        )
        adapted = self.adapter(
            self.adapter_inputs(encoded.frames, encoded.captured),
            encoded.lengths,
            train=modes.adapter,
            rngs=fold_rngs(rngs, _ADAPTER_RNG) if modes.adapter else None,
            extents=encoded.extents,
        )
        # cut last: up to here the frames beyond a clip are those that NeMo's batch norm counts
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
        """What the adapter sees: the encoder's output, or several of its layers [B, K, T, D]."""
        adapter = self.config.modality_adapter
        if not isinstance(adapter, READERS_OF_LAYERS) or captured is None:
            return frames
        if not adapter.include_final_output:
            return captured
        return jnp.concatenate([captured, frames[:, None]], axis=1)

    def _features(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        modes: PerceptionModes,
        rngs: Key[Array, " B"] | None,
    ) -> Frames:
        """Log-mel frames, dithered and masked as the modes say."""
        dither_rngs = fold_rngs(rngs, _DITHER_RNG) if modes.log_mel else None
        features = self.log_mel(audio, lengths, rngs=dither_rngs)
        mask_rngs = fold_rngs(rngs, _SPEC_AUGMENT_RNG)
        if not modes.spec_augment or self.config.spec_augment is None or mask_rngs is None:
            return features
        masked = spec_augment(features, self.config.spec_augment, mask_rngs)
        return Frames(frames=masked, lengths=features.lengths)
