"""Static shapes for answering: few programs, whatever is asked."""

from collections.abc import Sequence

from speechlm2_jax.batches import BatchShape, FrameCount, SalmExample

SAMPLE_STEP = 16000
TOKEN_STEP = 32


def round_up(n: int, step: int) -> int:
    """The least of step, 2 step, 3 step, 4 step, 6 step, 8 step, 12 step, ... that is >= n.

    Two sizes per doubling: padding stays under a half, and the number of sizes logarithmic.
    """
    size = step
    while size < n:
        half = size + size // 2
        size = half if half >= n and half % step == 0 else size * 2
    return size


def answer_shape(groups: Sequence[Sequence[SalmExample]], frame_count: FrameCount) -> BatchShape:
    """The static shape that holds the prompts of each of these groups."""
    examples = [example for group in groups for example in group]
    clips = [clip for example in examples for clip in example.audio]
    most_clips = max(sum(len(example.audio) for example in group) for group in groups)
    longest = max(len(e.tokens) + sum(frame_count(len(c)) - 1 for c in e.audio) for e in examples)
    return BatchShape(
        rows=round_up(max(map(len, groups)), 1),
        tokens=round_up(longest, TOKEN_STEP),
        clips=round_up(most_clips, 1) if clips else 0,
        samples=round_up(max(map(len, clips), default=0), SAMPLE_STEP) if clips else 0,
    )
