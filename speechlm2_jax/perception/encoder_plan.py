"""Static sizes of a FastConformer's stream: frames per step, delays, and what each layer keeps."""

from dataclasses import dataclass

from speechlm2_jax.perception.fastconformer_config import Context, FastConformerConfig


@dataclass(frozen=True, kw_only=True)
class SubsamplingStage:
    """Static sizes of one subsampling stage in a stream."""

    carry: int
    """Past input frames in its state."""
    first: int
    """Position of its first output of step 0; negative: before the start."""


@dataclass(frozen=True, kw_only=True)
class EncoderPlan:
    """Static sizes of a stream through one encoder. Raises ValueError if it cannot stream."""

    config: FastConformerConfig
    frames: int
    """Output frames per step."""
    lead: int
    """Input frames of step 0 that lie before the start of the stream."""
    context: Context
    """(left, right) attention context."""
    longest: int | None = None
    """Length of the KV cache if the left context is unbounded (-1)."""

    def __post_init__(self) -> None:
        left, right = self.context
        style = self.config.att_context_style
        if self.frames < 1 or self.lead < 0:
            raise ValueError(
                f"frames={self.frames} must be at least 1, lead={self.lead} at least 0"
            )
        if self.config.norm_groups:
            raise ValueError(
                f"conv_norm_type={self.config.conv_norm_type}: group norm needs whole clips and "
                "cannot stream; use an encoder with layer_norm or batch_norm"
            )
        if right < 0:
            raise ValueError(
                f"att_context_size={list(self.context)}: a stream needs a bounded right context; "
                "use an encoder trained with one, such as [70, 1]"
            )
        if left < 0 and self.longest is None:
            raise ValueError(
                f"att_context_size={list(self.context)}: a stream needs a bounded left context, or "
                "`longest`: the maximum number of frames"
            )
        if style == "chunked_limited" and left > 0 and left % (right + 1):
            raise ValueError(
                f"att_context_size={list(self.context)}: left must be a multiple of right + 1 "
                "(the chunk)"
            )

    @property
    def input_frames(self) -> int:
        """Input frames per step."""
        return self.frames * self.config.subsampling_factor

    @property
    def stages(self) -> tuple[SubsamplingStage, ...]:
        """The subsampling stages; () with factor 1."""
        position, factor = -self.lead, self.config.subsampling_factor
        if self.config.is_stacking:
            return (SubsamplingStage(carry=position % factor, first=position // factor),)
        stages: list[SubsamplingStage] = []
        before = self.config.stage_padding[0]
        for _ in range(self.config.stages):
            first = (position + before - 1) // 2
            stages.append(SubsamplingStage(carry=position - 2 * first + before, first=first))
            position = first
        return tuple(stages)

    @property
    def first(self) -> int:
        """Position of the first subsampled frame of step 0."""
        return self.stages[-1].first if self.stages else -self.lead

    @property
    def conv_delay(self) -> int:
        """Look-ahead of each layer's convolution, in frames."""
        return self.config.conv_context[1]

    @property
    def is_aligned(self) -> bool:
        """Whether every step of every layer consists of whole attention chunks."""
        chunk = self.context[1] + 1
        offsets = (self.frames, self.first, self.conv_delay)
        return self.config.att_context_style == "chunked_limited" and not any(
            offset % chunk for offset in offsets
        )

    @property
    def attention_delay(self) -> int:
        """Look-ahead of each layer's attention beyond a step, in frames."""
        return 0 if self.is_aligned else self.context[1]

    @property
    def cache(self) -> int:
        """Length of each layer's KV cache, in frames."""
        left = self.context[0] if self.context[0] >= 0 else (self.longest or 0)
        chunked = self.config.att_context_style == "chunked_limited"
        unaligned = self.context[1] if chunked and not self.is_aligned else 0
        return left + self.attention_delay + unaligned

    @property
    def layer_delay(self) -> int:
        """Delay of each layer, in frames."""
        return self.attention_delay + self.conv_delay

    @property
    def delay(self) -> int:
        """Delay of the output, in frames: step 0 starts at position -delay."""
        return self.config.n_layers * self.layer_delay - self.first
