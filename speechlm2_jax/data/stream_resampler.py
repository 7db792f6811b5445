"""Changes the rate of audio that comes piece by piece."""

import math

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import FILTER_CROSSINGS, resample


class StreamResampler:
    """Changes the rate of one stream. The joined outputs are those of `resample`.

    A stretch is resampled with its neighbours, as far as the filter reaches. Its outputs are sums
    of the same products in the same order, so they are equal bit for bit. Raises ValueError for
    rates that are not positive.
    """

    def __init__(self, from_hz: int, to_hz: int) -> None:
        if from_hz <= 0 or to_hz <= 0:
            raise ValueError(f"sample rates must be positive, got {from_hz} and {to_hz} Hz")
        self._rates = (from_hz, to_hz)
        divisor = math.gcd(from_hz, to_hz)
        self._up, self._down = to_hz // divisor, from_hz // divisor
        reach = FILTER_CROSSINGS * max(self._up, self._down) // self._up + 2
        self._margin = 0 if from_hz == to_hz else -(-reach // self._down) * self._down
        self._held = np.zeros(0, np.float32)
        self._done = 0
        """Held samples whose outputs were given already; they are neighbours of the next ones."""

    @property
    def delay_s(self) -> float:
        """The longest time from a sample to the output for it."""
        period = 0 if self._margin == 0 else self._down
        return (self._margin + period) / self._rates[0]

    def push(self, samples: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S2"]:
        """Takes the next samples; returns the outputs that later samples cannot change."""
        if not self._margin:
            return samples
        joined = np.concatenate([self._held, samples])
        ready = (len(joined) - self._done - self._margin) // self._down * self._down
        if ready <= 0:
            self._held = joined
            return joined[:0]
        end = self._done + ready
        output = resample(joined[: end + self._margin], *self._rates)
        output = output[self._outputs(self._done) : self._outputs(end)]
        start = max(end - self._margin, 0)
        self._held, self._done = joined[start:].copy(), end - start
        return output

    def finish(self) -> Float[np.ndarray, " S2"]:
        """Ends the stream and returns its last outputs. The next sample begins a new stream."""
        output = resample(self._held, *self._rates)[self._outputs(self._done) :]
        self._held, self._done = self._held[:0], 0
        return output

    def _outputs(self, samples: int) -> int:
        return samples // self._down * self._up
