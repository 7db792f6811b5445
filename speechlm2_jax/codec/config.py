"""Settings of a codec, under the key names of NeMo's AudioCodecModel and with its defaults."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

ACTIVATIONS = ("elu", "lrelu", "snake", "half_snake")
OUTPUT_ACTIVATIONS = ("tanh", "clamp")
PAD_MODES = ("zeros", "reflect", "replicate")


@dataclass(frozen=True, kw_only=True)
class HiFiGANConfig:
    """Keys that encoder and decoder share."""

    is_causal: ClassVar[bool] = False

    base_channels: int = 32
    in_kernel_size: int = 7
    out_kernel_size: int = 7
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[int, ...] = (1, 3, 5)
    activation: str = "lrelu"
    pad_mode: str = "reflect"
    """Padding of non-causal convolutions; causal ones always use zeros."""

    def __post_init__(self) -> None:
        if self.activation.lower() not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not supported; use {' or '.join(ACTIVATIONS)}"
            )
        if self.pad_mode not in PAD_MODES:
            raise ValueError(
                f"pad_mode={self.pad_mode!r} is not supported; use {' or '.join(PAD_MODES)}"
            )
        kernels = (self.in_kernel_size, self.out_kernel_size, *self.resblock_kernel_sizes)
        if any(k < 1 or (k % 2 == 0 and not self.is_causal) for k in kernels):
            raise ValueError(f"kernel sizes {kernels} must be positive, and odd if not causal")
        for key in ("resblock_kernel_sizes", "resblock_dilation_sizes"):
            if not getattr(self, key) or min(getattr(self, key)) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be a list of positive numbers")


@dataclass(frozen=True, kw_only=True)
class HiFiGANEncoderConfig(HiFiGANConfig):
    """NeMo's HiFiGANEncoder: each stage divides the frame rate and doubles the channels."""

    TARGETS: ClassVar[tuple[str, ...]] = ("HiFiGANEncoder",)

    encoded_dim: int
    down_sample_rates: tuple[int, ...] = (2, 2, 8, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates("down_sample_rates", self.down_sample_rates)


@dataclass(frozen=True, kw_only=True)
class CausalHiFiGANEncoderConfig(HiFiGANEncoderConfig):
    """NeMo's CausalHiFiGANEncoder: the same with causal convolutions."""

    TARGETS: ClassVar[tuple[str, ...]] = ("CausalHiFiGANEncoder",)
    is_causal: ClassVar[bool] = True

    pad_mode: str = "zeros"


@dataclass(frozen=True, kw_only=True)
class HiFiGANDecoderConfig(HiFiGANConfig):
    """NeMo's HiFiGANDecoder (Kong et al. 2020): each stage multiplies the frame rate."""

    TARGETS: ClassVar[tuple[str, ...]] = ("HiFiGANDecoder",)

    input_dim: int
    up_sample_rates: tuple[int, ...] = (8, 8, 2, 2)
    base_channels: int = 512
    out_kernel_size: int = 3
    output_activation: str = "tanh"
    n_groups_equal_to_out_channels: bool = False
    """Upsampling convolutions are grouped, one group of inputs per output channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rates("up_sample_rates", self.up_sample_rates)
        if self.output_activation not in OUTPUT_ACTIVATIONS:
            raise ValueError(
                f"output_activation={self.output_activation!r} is not supported; "
                f"use {' or '.join(OUTPUT_ACTIVATIONS)}"
            )
        halvings = 2 ** len(self.up_sample_rates)
        if self.base_channels < halvings:
            raise ValueError(f"base_channels={self.base_channels} must be at least {halvings}")
        if self.n_groups_equal_to_out_channels and self.base_channels % halvings:
            raise ValueError(
                f"base_channels={self.base_channels} must be a multiple of {halvings} "
                "with n_groups_equal_to_out_channels"
            )


@dataclass(frozen=True, kw_only=True)
class CausalHiFiGANDecoderConfig(HiFiGANDecoderConfig):
    """NeMo's CausalHiFiGANDecoder: can decode a stream frame by frame."""

    TARGETS: ClassVar[tuple[str, ...]] = ("CausalHiFiGANDecoder",)
    is_causal: ClassVar[bool] = True

    pad_mode: str = "zeros"
    n_groups_equal_to_out_channels: bool = True


@dataclass(frozen=True, kw_only=True)
class FiniteScalarQuantizerConfig:
    """NeMo's FiniteScalarQuantizer: one codebook over all channels."""

    TARGETS: ClassVar[tuple[str, ...]] = ("FiniteScalarQuantizer",)

    num_levels: tuple[int, ...]
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError(
                f"num_levels={list(self.levels)} must be a list of numbers of at least 2"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Number of levels of each channel of a codebook."""
        return self.num_levels

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return 1

    @property
    def codebook_size(self) -> int:
        """Number of codes of each codebook."""
        return math.prod(self.levels)

    @property
    def width(self) -> int:
        """Channels of all codebooks together."""
        return self.num_codebooks * len(self.levels)


@dataclass(frozen=True, kw_only=True)
class GroupFiniteScalarQuantizerConfig(FiniteScalarQuantizerConfig):
    """NeMo's GroupFiniteScalarQuantizer: equal groups of channels, one codebook per group."""

    TARGETS: ClassVar[tuple[str, ...]] = ("GroupFiniteScalarQuantizer",)
    ALIASES: ClassVar[Mapping[str, str]] = {"num_levels_per_group": "num_levels"}

    num_groups: int

    @property
    def num_codebooks(self) -> int:
        """Codes per frame: one for each group."""
        return self.num_groups


EncoderConfig = HiFiGANEncoderConfig | CausalHiFiGANEncoderConfig
DecoderConfig = HiFiGANDecoderConfig | CausalHiFiGANDecoderConfig
QuantizerConfig = GroupFiniteScalarQuantizerConfig | FiniteScalarQuantizerConfig


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """The blocks of NeMo's AudioCodecModel that encode and decode."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "semantic_codec": "a second, semantic codec inside a codec is not supported",
        "semantic_codec_path": "a second, semantic codec inside a codec is not supported",
    }

    sample_rate: int
    samples_per_frame: int
    audio_encoder: EncoderConfig
    audio_decoder: DecoderConfig
    vector_quantizer: QuantizerConfig
    output_sample_rate: int | None = None
    """Must equal sample_rate if set."""

    def __post_init__(self) -> None:
        for key, rates in (
            ("audio_encoder.down_sample_rates", self.audio_encoder.down_sample_rates),
            ("audio_decoder.up_sample_rates", self.audio_decoder.up_sample_rates),
        ):
            if math.prod(rates) != self.samples_per_frame:
                raise ValueError(
                    f"{key}={rates} must multiply to samples_per_frame={self.samples_per_frame}"
                )
        width = self.vector_quantizer.width
        for key, dim in (
            ("audio_encoder.encoded_dim", self.audio_encoder.encoded_dim),
            ("audio_decoder.input_dim", self.audio_decoder.input_dim),
        ):
            if dim != width:
                raise ValueError(f"{key}={dim} must be {width}, the quantizer's channels")
        if self.output_sample_rate not in (None, self.sample_rate):
            raise ValueError(
                f"output_sample_rate={self.output_sample_rate} must equal "
                f"sample_rate={self.sample_rate}; codecs that change the rate are not supported"
            )

    @property
    def num_codebooks(self) -> int:
        """Codes per frame."""
        return self.vector_quantizer.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Number of codes of each codebook."""
        return self.vector_quantizer.codebook_size

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.samples_per_frame

    def frame_count(self, samples: int) -> int:
        """Counts the frames of `samples` samples, rounded up."""
        return -(-samples // self.samples_per_frame)


def _check_rates(key: str, rates: tuple[int, ...]) -> None:
    if not rates or min(rates) < 2:
        raise ValueError(f"{key}={rates} must be a list of numbers of at least 2")
