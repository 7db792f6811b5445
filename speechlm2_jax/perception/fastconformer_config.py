"""Settings of a FastConformer, under NeMo's key names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from speechlm2_jax.arrays import Size

Context = tuple[int, int]
CONVOLUTIONS = ("dw_striding", "striding")
STACKINGS = ("stacking", "stacking_norm")
GROUP_NORM = "group_norm"
_ONLY_WITH_REDUCTION = "only read by mid-network reduction, which is refused"
_ONLY_WITH_STOCHASTIC_DEPTH = "only read by stochastic depth, which is not supported"
_TABLE_SIZE = "sizes NeMo's position table; here the table follows the input"
_TORCH_KERNELS = "chooses among torch's attention kernels; the result is the same"


@dataclass(frozen=True, kw_only=True)
class FastConformerConfig:
    """NeMo's ConformerEncoder block, key by key, with NeMo's defaults (Rekesh et al. 2023)."""

    TARGETS: ClassVar[tuple[str, ...]] = ("ConformerEncoder",)
    IGNORED: ClassVar[Mapping[str, str | tuple[object, ...]]] = {
        "subsampling_conv_chunking_factor": "works around a torch limit on indices; same result",
        "reduction_position": _ONLY_WITH_REDUCTION,
        "reduction_factor": _ONLY_WITH_REDUCTION,
        "stochastic_depth_drop_prob": (
            "only read in training; stochastic depth is not supported",
            0,
        ),
        "stochastic_depth_mode": _ONLY_WITH_STOCHASTIC_DEPTH,
        "stochastic_depth_start_layer": _ONLY_WITH_STOCHASTIC_DEPTH,
        "global_tokens_spacing": "only read with global_tokens, which are refused",
        "use_pytorch_sdpa": _TORCH_KERNELS,
        "use_pytorch_sdpa_backends": _TORCH_KERNELS,
        "pos_emb_max_len": _TABLE_SIZE,
        "sync_max_audio_length": _TABLE_SIZE,
    }
    REFUSED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "reduction": ("reduction between layers is not supported; set it to null", None),
        "att_chunk_context_size": ("only plain chunked_limited is supported; set it to null", None),
        "conv_context_style": ("only the regular convolution context is supported", "regular"),
        "global_tokens": ("local attention with global tokens is not supported; set it to 0", 0),
        "global_attn_separate": ("global tokens are not supported; set it to false", False),
    }

    feat_in: int
    n_layers: int
    d_model: int
    feat_out: int = -1
    causal_downsampling: bool = False
    subsampling: str | None = "striding"
    """dw_striding, striding, stacking or stacking_norm; null, with factor 1, is a linear layer."""
    subsampling_factor: int = 4
    subsampling_conv_channels: int = -1
    ff_expansion_factor: int = 4
    self_attention_model: str = "rel_pos"
    """rel_pos or abs_pos."""
    n_heads: int = 4
    att_context_size: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None
    """[left, right] attention context in frames, -1: all; or several pairs (`contexts`)."""
    att_context_probs: tuple[float, ...] | None = None
    att_context_style: str = "regular"
    xscaling: bool = True
    untie_biases: bool = True
    conv_kernel_size: int = 31
    conv_norm_type: str = "batch_norm"
    """batch_norm, layer_norm, or group_normN with N groups of channels."""
    conv_context_size: str | tuple[int, ...] | None = None
    use_bias: bool = True
    dropout: float = 0.1
    dropout_pre_encoder: float = 0.1
    dropout_emb: float = 0.1
    dropout_att: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self)
        choices = {
            "subsampling": (*CONVOLUTIONS, *STACKINGS, None),
            "self_attention_model": ("rel_pos", "abs_pos"),
            "att_context_style": ("regular", "chunked_limited"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                usable = " or ".join(map(str, allowed))
                raise ValueError(f"{key}={getattr(self, key)!r} is not supported; use {usable}")
        _check_norm(self)
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size={self.conv_kernel_size} must be odd")
        for key in ("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(f"{key}={getattr(self, key)} must be in [0, 1)")
        _check_contexts(self)
        if sum(self.conv_context) + 1 != self.conv_kernel_size:
            raise ValueError(
                f"conv_context_size={self.conv_context_size} must be null, causal or two numbers "
                f"whose sum is conv_kernel_size - 1 = {self.conv_kernel_size - 1}"
            )

    @property
    def contexts(self) -> tuple[Context, ...]:
        """(left, right) attention contexts: evaluation takes the first, training draws one."""
        sizes = self.att_context_size or (-1, -1)
        pairs = sizes if isinstance(sizes[0], tuple) else (sizes,)
        return tuple((int(pair[0]), int(pair[1])) for pair in pairs)  # type: ignore[index]

    @property
    def context_probabilities(self) -> tuple[float, ...]:
        """Probability of each of `contexts` in training."""
        count = len(self.contexts)
        return self.att_context_probs or (1.0 / count,) * count

    @property
    def conv_context(self) -> Context:
        """(left, right) context of the depthwise convolution, in frames."""
        reach = self.conv_kernel_size - 1
        named = {None: (reach // 2, reach // 2), "regular": (reach // 2, reach // 2)}
        named["causal"] = (reach, 0)
        size = self.conv_context_size
        if isinstance(size, tuple):
            return (size[0], size[1]) if len(size) == 2 else (-1, -1)
        return named.get(size, (-1, -1))

    @property
    def conv_channels(self) -> int:
        """Channels of the subsampling convolutions."""
        channels = self.subsampling_conv_channels
        return self.d_model if channels == -1 else channels

    @property
    def is_stacking(self) -> bool:
        """Whether subsampling concatenates neighbouring frames instead of convolving."""
        return self.subsampling in STACKINGS and self.subsampling_factor > 1

    @property
    def is_relative(self) -> bool:
        """Whether attention is relative; else position embeddings are added to the input."""
        return self.self_attention_model == "rel_pos"

    @property
    def norm_groups(self) -> int:
        """Number of groups of group norm; 0 for another norm."""
        name, _, groups = self.conv_norm_type.rpartition(GROUP_NORM)
        return int(groups) if not name and groups.isdigit() else 0

    @property
    def stages(self) -> int:
        """Number of stride-2 convolutions."""
        return 0 if self.is_stacking else self.subsampling_factor.bit_length() - 1

    @property
    def stage_padding(self) -> Context:
        """Zeros before and after time (and frequency) in each halving convolution of 3 taps."""
        return (2, 1) if self.causal_downsampling else (1, 1)

    @property
    def width(self) -> int:
        """Width of the output frames."""
        return self.feat_out if self.feat_out > 0 else self.d_model

    def frame_count(self, frames: int) -> int:
        """Counts the output frames for `frames` input frames; 0 for 0."""
        return self.subsampled(frames) if frames > 0 else 0

    def subsampled(self, size: Size) -> Size:
        """Size of an axis (time or frequency) after subsampling: an int, or an array of them."""
        if self.is_stacking:
            return -(-size // self.subsampling_factor)
        for _ in range(self.stages):
            size = self.halved(size)
        return size

    def halved(self, size: Size) -> Size:
        """Size of an axis after one convolution of 3 taps and stride 2."""
        return (size + sum(self.stage_padding) - 3) // 2 + 1


def _check_sizes(config: FastConformerConfig) -> None:
    """Checks that the sizes fit each other."""
    for key in ("feat_in", "n_layers", "d_model", "n_heads", "ff_expansion_factor"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key}={getattr(config, key)} must be at least 1")
    factor = config.subsampling_factor
    if config.subsampling is None and factor != 1:
        raise ValueError(
            f"subsampling: null needs subsampling_factor=1, got {factor}; set the factor to 1, or "
            "subsampling to dw_striding, striding, stacking or stacking_norm"
        )
    if factor < 1 or (factor & (factor - 1) and not config.is_stacking):
        raise ValueError(f"subsampling_factor={factor} must be a power of two")
    if config.d_model % config.n_heads:
        raise ValueError(f"n_heads={config.n_heads} must divide d_model={config.d_model}")
    if config.d_model % 2:
        raise ValueError(f"d_model={config.d_model} must be even (sine and cosine positions)")


def _check_norm(config: FastConformerConfig) -> None:
    kind, groups = config.conv_norm_type, config.norm_groups
    if kind not in ("batch_norm", "layer_norm") and not groups:
        raise ValueError(
            f"conv_norm_type={kind!r} is not supported; use batch_norm, layer_norm or group_normN "
            "with N groups of channels"
        )
    if groups and config.d_model % groups:
        raise ValueError(
            f"conv_norm_type={kind!r}: d_model={config.d_model} must be a multiple of {groups}"
        )


def _check_contexts(config: FastConformerConfig) -> None:
    sizes = config.att_context_size
    if sizes:
        pairs = sizes if isinstance(sizes[0], tuple) else (sizes,)
        if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"att_context_size={sizes} must be [left, right] or a list of such pairs"
            )
    for left, right in config.contexts:
        if min(left, right) < -1:
            raise ValueError(f"att_context_size={sizes} must be numbers of frames, or -1 for all")
        if config.att_context_style == "chunked_limited":
            if right < 0 and len(config.contexts) == 1:
                raise ValueError(
                    f"att_context_size={sizes}: chunked_limited needs a bounded right context"
                )
            if left > 0 and right >= 0 and left % (right + 1):
                raise ValueError(
                    f"att_context_size={sizes}: left must be a multiple of right + 1 (the chunk)"
                )
    probabilities = config.context_probabilities
    if len(probabilities) != len(config.contexts) or abs(sum(probabilities) - 1.0) > 1e-6:
        raise ValueError("att_context_probs must have one number per att_context_size and sum to 1")
