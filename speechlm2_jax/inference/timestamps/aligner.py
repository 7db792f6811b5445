"""What aligns texts with recordings: `CtcAligner` and `TransducerAligner`."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.inference.timestamps.bounds import TimedLabel, Timing


class AlignedLabels(NamedTuple):
    """The labels of one text in time, or why there are none."""

    labels: tuple[TimedLabel, ...]
    log_probs: tuple[float | None, ...]
    """Mean log-probability of each label over its frames, in nats; None if it is not known."""
    score: float | None
    """Mean log-probability of the path per frame, blanks included, in nats; None if not known."""
    problem: str | None = None
    """Why the text does not fit: its labels then have no frames."""


@runtime_checkable
class Aligner(Protocol):
    """An ASR model that aligns known texts with recordings."""

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the recordings."""
        ...

    @property
    def frame_s(self) -> float:
        """Seconds per frame."""
        ...

    @property
    def timing(self) -> Timing:
        """How its labels lie in time."""
        ...

    def align(
        self, waves: Sequence[np.ndarray], words: Sequence[Sequence[str]]
    ) -> list[AlignedLabels]:
        """Aligns the words of each recording (float32 [S])."""
        ...
