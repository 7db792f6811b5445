"""Static shapes for inference: sizes are rounded up, so that few programs are compiled."""

from collections.abc import Sequence

from speechlm2_jax.batches import BatchShape, FrameCount, SalmExample

SAMPLE_UNIT = 16000
"""Sample counts are rounded up in units of 16,000: one second at 16 kHz."""
TOKEN_UNIT = 32
"""Prompt lengths are rounded up in units of 32 tokens."""


def round_up(n: int, unit: int) -> int:
    """Rounds up to 1.0x or 1.5x a power of two, in units of `unit`: with unit 1, 5 -> 6, 7 -> 8.

    The sizes are unit x (1, 2, 3, 4, 6, 8, 12, 16, ...). If n is at least `unit`, less than half of
    a size is padding.
    """
    size = unit
    while size < n:
        half = size + size // 2
        size = half if half >= n and half % unit == 0 else size * 2
    return size


def prompt_shape(groups: Sequence[Sequence[SalmExample]], frame_count: FrameCount) -> BatchShape:
    """The static shape that holds the prompts of every data-parallel shard (`groups`)."""
    examples = [example for group in groups for example in group]
    clips = [clip for example in examples for clip in example.audio]
    most_clips = max(sum(len(example.audio) for example in group) for group in groups)
    longest = max(len(e.tokens) + sum(frame_count(len(c)) - 1 for c in e.audio) for e in examples)
    return BatchShape(
        sequences=round_up(max(map(len, groups)), 1),
        tokens=round_up(longest, TOKEN_UNIT),
        clips=round_up(most_clips, 1) if clips else 0,
        samples=round_up(max(map(len, clips), default=0), SAMPLE_UNIT) if clips else 0,
    )
