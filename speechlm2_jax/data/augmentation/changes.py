"""How long a recording becomes. It is decided as batches are planned, because shapes are static."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from speechlm2_jax.data.augmentation.effects import Wave, change_speed

Direction = Literal["right", "left", "both", "random"]
SHARES_BEFORE = {"right": 0.0, "both": 0.5, "left": 1.0}
"""Of the silence, what goes before the recording."""


@dataclass(frozen=True, kw_only=True)
class ClipChanges:
    """What becomes of a stretch of a recording between reading and the model."""

    read_s: float
    """Seconds of the recording that are read."""
    room_s: float = 0.0
    """Seconds of the recording by which its start is moved at random."""
    speed: float = 1.0
    """It is played so many times as fast."""
    padding: Direction | None = None
    """Where silence is added, up to the planned length."""

    def apply(self, wave: Wave, rate_hz: int, samples: int, place: float) -> Wave:
        """What was read, as the planned number of samples; `place` is a random share."""
        if self.speed != 1.0:
            wave = change_speed(wave, rate_hz, self.speed)
        missing = samples - len(wave)
        if self.padding is None or missing <= 0:
            return wave[:samples]
        before = round(SHARES_BEFORE.get(self.padding, place) * missing)
        return np.pad(wave, (before, missing - before))
