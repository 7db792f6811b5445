"""Log-mel front end: waveform -> normalised log-mel frames, in fp32 whatever the compute dtype.

Computes the features of NeMo's AudioToMelSpectrogramPreprocessor, on which its encoders were
trained: zero-padded centred STFT, Slaney filters, ln(mel + 2^-24), and normalisation over the real
frames of each clip.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.module import buffer
from speechlm2_jax.perception.frames import Frames, is_within
from speechlm2_jax.perception.mel_filterbank import WINDOWS, analysis_window, mel_filterbank
from speechlm2_jax.sharding import on_shards

STD_FLOOR = 1e-5
"""Added to the standard deviation (not to the variance), as in NeMo."""
NORMALISATIONS = ("per_feature", "all_features", "NA", None)


@dataclass(frozen=True, kw_only=True)
class LogMelConfig:
    """NeMo's preprocessor block, key by key; sizes in seconds, samples or Hz as in NeMo."""

    TARGETS: ClassVar[tuple[str, ...]] = ("AudioToMelSpectrogramPreprocessor",)
    IGNORED: ClassVar[Mapping[str, str | tuple[object, ...]]] = {
        "use_torchaudio": "deprecated in NeMo, where it has no effect",
        "stft_exact_pad": "deprecated in NeMo, where it has no effect",
        "stft_conv": "deprecated in NeMo, where it has no effect",
        "nb_augmentation_prob": (
            "only read in training; narrow-band augmentation is not supported",
            0,
        ),
        "nb_max_freq": "only read by narrow-band augmentation, which is not supported",
    }
    REFUSED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "frame_splicing": ("frame splicing is not supported; set it to 1", 1),
        "rng": ("random draws come from the run's seed; set rng to null", None),
    }

    sample_rate: int = 16000
    window_size: float | None = 0.02
    window_stride: float | None = 0.01
    n_window_size: int | None = None
    n_window_stride: int | None = None
    window: str = "hann"
    normalize: str | None = "per_feature"
    n_fft: int | None = None
    preemph: float | None = 0.97
    features: int = 64
    lowfreq: float = 0.0
    highfreq: float | None = None
    log: bool = True
    log_zero_guard_type: str = "add"
    log_zero_guard_value: float | str = 2.0**-24
    dither: float = 1e-5
    pad_to: int = 16
    exact_pad: bool = False
    pad_value: float = 0.0
    mag_power: float = 2.0
    mel_norm: str | None = "slaney"

    def __post_init__(self) -> None:
        for seconds, samples in (
            ("window_size", "n_window_size"),
            ("window_stride", "n_window_stride"),
        ):
            given = [bool(getattr(self, name)) for name in (seconds, samples)]
            if sum(given) != 1:
                raise ValueError(f"set exactly one of {seconds} (seconds) and {samples} (samples)")
        choices = {
            "window": WINDOWS,
            "normalize": NORMALISATIONS,
            "log_zero_guard_type": ("add", "clamp"),
            "mel_norm": ("slaney", None),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                names = ", ".join("null" if a is None else a for a in allowed)
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is not supported; use one of {names}"
                )
        if isinstance(self.log_zero_guard_value, str) and self.log_zero_guard_value not in _GUARDS:
            raise ValueError(
                f"log_zero_guard_value={self.log_zero_guard_value!r} must be a number, tiny or eps"
            )
        if self.window_samples > self.fft_size:
            raise ValueError(
                f"n_fft={self.fft_size} must be at least the window: {self.window_samples} samples"
            )
        if self.exact_pad and self.hop_samples % 2:
            raise ValueError(f"exact_pad needs an even hop; it is {self.hop_samples} samples")

    @property
    def window_samples(self) -> int:
        """Length of the analysis window."""
        return self.n_window_size or int((self.window_size or 0.0) * self.sample_rate)

    @property
    def hop_samples(self) -> int:
        """Hop length in samples."""
        return self.n_window_stride or int((self.window_stride or 0.0) * self.sample_rate)

    @property
    def fft_size(self) -> int:
        """FFT length: by default the next power of two."""
        return self.n_fft or 2 ** math.ceil(math.log2(self.window_samples))

    @property
    def guard(self) -> float:
        """The offset or floor inside the logarithm."""
        value = self.log_zero_guard_value
        return _GUARDS[value] if isinstance(value, str) else value

    @property
    def side_padding(self) -> int:
        """Zeros padded before and after the waveform."""
        return (self.fft_size - self.hop_samples) // 2 if self.exact_pad else self.fft_size // 2

    @property
    def window_start(self) -> int:
        """Samples from the start of frame 0's window to the start of the waveform."""
        return self.side_padding - (self.fft_size - self.window_samples) // 2

    def frame_count(self, samples: int) -> int:
        """Counts the real frames of a clip. The STFT's last frame is dropped, as in NeMo."""
        frames = (samples + 2 * self.side_padding - self.fft_size) // self.hop_samples
        return max(frames, 0) if samples > 0 else 0

    def frame_extent(self, samples: int) -> int:
        """Counts the frames that a batch padded to `samples` has in NeMo (pad_to included)."""
        frames = 1 + (samples + 2 * self.side_padding - self.fft_size) // self.hop_samples
        multiple = self.pad_to or 1
        return -(-frames // multiple) * multiple


_FRAMES = ("clips", "frames", None)
_GUARDS = {"tiny": 2.0**-126, "eps": 2.0**-23}


class LogMel(nnx.Module):
    """Waveform [B, S] -> log-mel frames [B, T, M] with T = config.frame_extent(S).

    The filterbank and the window are buffers: a checkpoint's own tables replace the computed ones.
    """

    def __init__(self, config: LogMelConfig):
        self.config = config
        filters = mel_filterbank(
            sample_rate_hz=config.sample_rate,
            n_fft=config.fft_size,
            bins=config.features,
            low_hz=config.lowfreq,
            high_hz=config.highfreq or config.sample_rate / 2,
            area_normalised=config.mel_norm == "slaney",
        )
        self.filterbank = buffer(jnp.asarray(filters), ("feature", "feature"))
        window = analysis_window(config.window, config.window_samples)
        self.window = buffer(jnp.asarray(window), ("feature",))

    def __call__(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        *,
        rngs: Key[Array, " B"] | None = None,
    ) -> Frames:
        """Computes the features of clips of `lengths` samples. Given `rngs`, dithers them first."""
        config = self.config
        wave = audio.astype(jnp.float32)
        if config.exact_pad:
            wave = jnp.pad(wave, ((0, 0), (config.side_padding,) * 2))
        wave = _dither(wave, config.dither, rngs)
        if config.preemph is not None:
            wave = _preemphasise(wave, lengths, config.preemph)
        n_fft = config.fft_size
        if not config.exact_pad:
            wave = jnp.pad(wave, ((0, 0), (n_fft // 2, n_fft // 2)))
        count = 1 + (wave.shape[1] - n_fft) // config.hop_samples
        # torch centres the window in the FFT frame; its offset there changes only the phase
        mel = self.features(wave[:, (n_fft - config.window_samples) // 2 :], count)
        frame_lengths = self.frame_lengths(lengths)
        features = _normalise(mel, frame_lengths, config.normalize)
        return Frames(
            frames=self._pad(features, frame_lengths, audio.shape[1]), lengths=frame_lengths
        )

    def frame_lengths(self, lengths: Int[Array, " B"]) -> Int[Array, " B"]:
        """`config.frame_count` for an array of lengths in samples."""
        config = self.config
        overhang = 2 * config.side_padding - config.fft_size
        frames = jnp.maximum((lengths + overhang) // config.hop_samples, 0)
        return jnp.where(lengths > 0, frames, 0)

    def frame_extents(self, extents: Int[Array, " B"]) -> Int[Array, " B"]:
        """`config.frame_extent` for an array of padded lengths in samples."""
        config = self.config
        frames = 1 + (extents + 2 * config.side_padding - config.fft_size) // config.hop_samples
        multiple = config.pad_to or 1
        return -(-frames // multiple) * multiple

    def features(self, wave: Float[Array, "B S"], count: int) -> Float[Array, "B T M"]:
        """Log-mel features of `count` windows, the first at the start of the wave."""
        mel = jnp.einsum(
            "btk,mk->btm",
            self._spectrum(wave, count),
            self.filterbank[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return self._log(mel)

    def _spectrum(self, wave: Float[Array, "B S"], count: int) -> Float[Array, "B T K"]:
        config = self.config
        size, hop, n_fft = config.window_samples, config.hop_samples, config.fft_size
        frames = (
            _overlapping(wave, size, hop, count) * self.window[...].astype(jnp.float32)[None, None]
        )
        # per shard: XLA's partitioner would all-gather the frames for an FFT
        spectrum = on_shards(
            lambda x: jnp.fft.rfft(x, n=n_fft), [frames], [_FRAMES], out_axes=_FRAMES
        )
        power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
        return power if config.mag_power == 2.0 else jnp.power(power, config.mag_power / 2.0)

    def _log(self, mel: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        config = self.config
        if not config.log:
            return mel
        if config.log_zero_guard_type == "clamp":
            return jnp.log(jnp.maximum(mel, config.guard))
        return jnp.log(mel + config.guard)

    def _pad(
        self, features: Float[Array, "B T M"], lengths: Int[Array, " B"], samples: int
    ) -> Float[Array, "B T2 M"]:
        """Sets padding frames to pad_value and pads time to a multiple of pad_to."""
        is_real = is_within(lengths, features.shape[1])[..., None]
        features = jnp.where(is_real, features, self.config.pad_value)
        missing = self.config.frame_extent(samples) - features.shape[1]
        padding = ((0, 0), (0, missing), (0, 0))
        return jnp.pad(features, padding, constant_values=self.config.pad_value)


def _dither(
    wave: Float[Array, "B S"], amount: float, rngs: Key[Array, " B"] | None
) -> Float[Array, "B S"]:
    """Adds white noise, drawn from each example's own key."""
    if rngs is None or amount <= 0.0:
        return wave
    noise = jax.vmap(lambda key: jax.random.normal(key, wave.shape[1:]))(rngs)
    return wave + amount * noise


def _preemphasise(
    wave: Float[Array, "B S"], lengths: Int[Array, " B"], coefficient: float
) -> Float[Array, "B S"]:
    """Computes y[t] = x[t] - a x[t-1], zeroed from each length on."""
    previous = jnp.pad(wave[:, :-1], ((0, 0), (1, 0)))
    is_real = is_within(lengths, wave.shape[1])
    return jnp.where(is_real, wave - coefficient * previous, 0.0)


def _overlapping(
    wave: Float[Array, "B S"], size: int, hop: int, count: int
) -> Float[Array, "B T size"]:
    """Frames a waveform into `count` windows, `hop` apart, by slices of whole hops (no gather)."""
    per_window = -(-size // hop)
    total = (count - 1 + per_window) * hop
    wave = jnp.pad(wave, ((0, 0), (0, max(total - wave.shape[1], 0))))[:, :total]
    hops = wave.reshape(wave.shape[0], -1, hop)
    parts = [hops[:, i : i + count] for i in range(per_window)]
    return jnp.concatenate(parts, axis=-1)[..., :size]


def _normalise(
    features: Float[Array, "B T M"], lengths: Int[Array, " B"], kind: str | None
) -> Float[Array, "B T M"]:
    """Subtracts the mean and divides by the unbiased standard deviation, both over real frames.

    A single frame has no deviation and becomes zeros (per_feature). Empty clips give no NaN.
    """
    if kind not in ("per_feature", "all_features"):
        return features
    axes, values_per_frame = ((1,), 1) if kind == "per_feature" else ((1, 2), features.shape[2])
    is_real = is_within(lengths, features.shape[1])[..., None]
    count = (lengths * values_per_frame).astype(jnp.float32)[:, None, None]
    total = jnp.sum(jnp.where(is_real, features, 0.0), axis=axes, keepdims=True)
    centred = features - total / jnp.maximum(count, 1.0)
    squares = jnp.sum(jnp.where(is_real, jnp.square(centred), 0.0), axis=axes, keepdims=True)
    return centred / (jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0)) + STD_FLOOR)
