"""The attributes of Lhotse's objects that are read here, for type checkers alone.

Lhotse itself is imported only where it reads. A cut that is mixed of several has `tracks` instead
of a recording.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    class AudioSource(Protocol):
        """Where Lhotse reads a recording from."""

        type: str
        source: Any
        channels: list[int]

    class Recording(Protocol):
        """A recording as a whole."""

        duration: float
        transforms: object
        sources: list[AudioSource]
        channel_ids: list[int]

        @property
        def num_channels(self) -> int:
            """Number of channels."""
            ...

    class Supervision(Protocol):
        """One turn: its speaker, text and times."""

        id: str
        speaker: str | None
        channel: int | list[int]
        start: float
        end: float
        text: str | None
        custom: dict[str, Any] | None

    class Cut(Protocol):
        """A stretch of a recording, with its supervisions."""

        id: str
        start: float
        duration: float
        sampling_rate: int
        recording: Recording
        channel: int | list[int]
        custom: dict[str, Any]
        supervisions: Sequence[Supervision]

        def truncate(self, *, offset: float, duration: float) -> "Cut":
            """The same of a stretch."""
            ...

        def load_audio(self) -> np.ndarray:
            """Samples [C, S]."""
            ...

else:
    Cut = Recording = Supervision = object

__all__ = ["Cut", "Recording", "Supervision"]
