"""The times of words, found beside the running batch: in a thread of their own, part by part."""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from speechlm2_jax.inference.long_form.pauses import Stretch
from speechlm2_jax.inference.recordings_to_text import words_by
from speechlm2_jax.inference.timed_text import Word
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.inference.timestamps.ctc_aligner import CtcAligner


class Alignment:
    """Finds the times of words as `transcribe` does, one part of a recording after the other.

    A part is at most `--max-audio-s` long, so the device is taken for a short time, and parts of
    several requests take turns. `rate_hz` is that of the recordings, and `clip_samples` are the
    sizes of clips that are compiled.
    """

    def __init__(self, aligner: Aligner, rate_hz: int, clip_samples: Sequence[int]) -> None:
        if isinstance(aligner, CtcAligner):
            share = aligner.sampling_rate / rate_hz
            sizes = [math.ceil(count * share) for count in clip_samples]
            aligner, self._sizes = aligner.in_sizes(sizes), sizes
        else:
            self._sizes = []
        self._aligner, self._rate_hz = aligner, rate_hz
        self._to_words = words_by(lambda: aligner, rate_hz)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="alignment")

    def compile(self, show: Callable[[str], None]) -> None:
        """Runs the programs of a CTC aligner once; those of a transducer compile when needed.

        `show` gets the name of each before it is compiled.
        """
        for size in self._sizes:
            show(f"aligner for clips of {size / self._aligner.sampling_rate:g} s")
            self._aligner.align([np.zeros(size, np.float32)], [["a"]])

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
