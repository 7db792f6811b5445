"""Samples of a live recording that wait until a step of the encoder can take them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.data.audio import check_samples
from speechlm2_jax.data.stream_resampler import StreamResampler
from speechlm2_jax.perception.streaming import StreamPlan


class AudioChunk(NamedTuple):
    """The samples of one step."""

    audio: Float[np.ndarray, " S"]
    """Padded with zeros to a whole chunk."""
    new: int
    """Real samples."""


class WaitingAudio:
    """Takes any number of samples at `input_hz`, gives chunks of `plan.samples` at `model_hz`."""

    def __init__(self, plan: StreamPlan, input_hz: int, model_hz: int) -> None:
        self.plan, self.model_hz = plan, model_hz
        self.is_finished = False
        """Whether the audio has ended."""
        self.taken = 0
        """Samples so far, at the model's rate."""
        self._resampler = StreamResampler(input_hz, model_hz)
        self._waiting = np.zeros(0, np.float32)
        self._steps = 0

    @property
    def chunk_s(self) -> float:
        """Seconds of audio that are computed together: one attention chunk of the encoder."""
        return self.plan.samples / self.model_hz

    @property
    def latency_s(self) -> float:
        """The longest time from the end of a frame's audio to the end of the last needed chunk."""
        frames = self.plan.frames - 1 + self.plan.delay
        return frames * self.plan.config.token_equivalent_duration + self._resampler.delay_s

    @property
    def has_chunk(self) -> bool:
        """Whether samples wait for a step, or the last frames after the end of the audio."""
        if self.is_finished:
            return self._steps < self.plan.steps_for(self.taken)
        return len(self._waiting) >= self.plan.samples

    @property
    def known_s(self) -> float:
        """Seconds of audio that the steps so far have read."""
        return min(self._steps * self.plan.samples, self.taken) / self.model_hz

    def push(self, samples: ArrayLike) -> None:
        """Takes the next samples [S].

        Raises ValueError for samples that are not finite floats of rank 1, and after `finish`.
        """
        self._check_unfinished()
        self._take(self._resampler.push(_checked(samples)))

    def finish(self) -> None:
        """Ends the audio. Raises ValueError after an earlier `finish`."""
        self._check_unfinished()
        self._take(self._resampler.finish())
        self.is_finished = True

    def next_chunk(self) -> AudioChunk:
        """Takes the samples of the next step."""
        wave = np.zeros(self.plan.samples, np.float32)
        taken = self._waiting[: self.plan.samples]
        wave[: len(taken)] = taken
        self._waiting = self._waiting[self.plan.samples :]
        self._steps += 1
        return AudioChunk(wave, len(taken))

    def _check_unfinished(self) -> None:
        if self.is_finished:
            raise ValueError("the session has ended; call reset() to start another one")

    def _take(self, samples: Float[np.ndarray, " S"]) -> None:
        self._check_length(self.taken + len(samples))
        self._waiting = np.concatenate([self._waiting, samples])
        self.taken += len(samples)

    def _check_length(self, samples: int) -> None:
        """Raises ValueError for more samples in all than a session may have; here none is."""


def _checked(samples: ArrayLike) -> Float[np.ndarray, " S"]:
    wave = np.asarray(samples)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(
            f"samples must be floats [S] within [-1, 1], got {wave.dtype} {list(wave.shape)}"
        )
    wave = wave.astype(np.float32)
    return check_samples(wave, "samples") if len(wave) else wave
