"""The fixed table of static shapes that a server compiles at its start."""

from dataclasses import dataclass

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.inference.padding import TOKEN_UNIT

AUDIO_SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
"""Sizes of clips, as shares of the longest: less than half of a clip is padding."""
TEXT_TOKENS = 256
"""Positions for text beside one clip of the longest duration."""


class TooLongError(ValueError):
    """A prompt that no slot has room for."""


@dataclass(frozen=True, kw_only=True)
class ShapeTable:
    """Sizes of everything that is compiled."""

    slots: int
    clip_samples: tuple[int, ...]
    """Sizes of clips, in ascending order."""
    prompt_tokens: int
    """Positions of the longest prompt; a multiple of `prefill_tokens`."""
    prefill_tokens: int
    """Positions of a prompt that are run at once."""
    new_tokens: int
    """Most new tokens of a response."""

    def samples(self, count: int) -> int:
        """The smallest clip size that holds `count` samples. Raises TooLongError."""
        for size in self.clip_samples:
            if count <= size:
                return size
        raise TooLongError(f"a clip of {count} samples is longer than {self.clip_samples[-1]}")


def make_table(
    *,
    frame_count: FrameCount,
    sampling_rate: int,
    max_clip_s: float,
    slots: int,
    new_tokens: int,
    prefill_tokens: int,
    prompt_tokens: int | None = None,
) -> ShapeTable:
    """Makes the table of a model.

    Prompts may have `prompt_tokens` positions; by default as many as one clip of `max_clip_s`
    seconds has frames, and `TEXT_TOKENS` more.
    """
    longest = round(max_clip_s * sampling_rate)
    least = sampling_rate // 2
    sizes = {max(-(-round(longest * share) // 1600) * 1600, least) for share in AUDIO_SHARES}
    wanted = prompt_tokens or frame_count(longest) + TEXT_TOKENS
    prefill = min(prefill_tokens, -(-wanted // TOKEN_UNIT) * TOKEN_UNIT)
    return ShapeTable(
        slots=slots,
        clip_samples=tuple(sorted(sizes)),
        prompt_tokens=-(-wanted // prefill) * prefill,
        prefill_tokens=prefill,
        new_tokens=new_tokens,
    )
