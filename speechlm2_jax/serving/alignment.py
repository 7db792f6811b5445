"""The times of words, found beside the running batch: in a thread of their own, part by part."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from speechlm2_jax.inference.long_form.pauses import Stretch
from speechlm2_jax.inference.recordings_to_text import words_by
from speechlm2_jax.inference.timed_text import Word
from speechlm2_jax.inference.timestamps.aligner import Aligner


class Alignment:
    """Finds the times of words as `transcribe` does, one part of a recording after the other.

    A part is at most `--max-audio-s` long, so the device is taken for a short time, and parts of
    several requests take turns. `rate_hz` is that of the recordings.
    """

    def __init__(self, aligner: Aligner, rate_hz: int) -> None:
        self._rate_hz = rate_hz
        self._to_words = words_by(lambda: aligner, rate_hz)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="alignment")

    async def words(
        self, wave: Float[np.ndarray, " S"], parts: Sequence[Stretch], texts: Sequence[str]
    ) -> list[tuple[Word, ...]]:
        """The words of the text of each part, with times in the recording."""
        loop = asyncio.get_running_loop()
        return [
            await loop.run_in_executor(self._thread, self._of_part, wave, part, text.strip())
            if text.strip()
            else ()
            for part, text in zip(parts, texts, strict=True)
        ]

    def close(self) -> None:
        """Ends the thread after its present part."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _of_part(self, wave: np.ndarray, part: Stretch, text: str) -> tuple[Word, ...]:
        start_s = part.start / self._rate_hz
        (words,) = self._to_words([wave[part.start : part.end]], [text], [start_s])
        return words
