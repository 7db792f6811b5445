"""What the server hands to the device thread, and what comes back."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one response are chosen. The default is greedy decoding."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    draw: int = 0
    """The draw number of `SALM.generate`; chunks of a long recording have numbers of their own."""
    avoids_loops: bool = False
    """No n-gram occurs twice, as `transcribe` generates a text again over which a model looped."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recording, or a part of one."""

    samples: Float32[np.ndarray, " S"]
    key: bytes | None = None
    """Equal for equal samples: its frames are then encoded once. None: they are not kept."""


@dataclass(frozen=True)
class Progress:
    """The tokens of a job so far."""

    ids: Int32[np.ndarray, " T"]
    logprobs: Float32[np.ndarray, " T"]
    is_last: bool
    error: str | None = None
    """Why there is no response: a fault of the server."""


Report = Callable[[Progress], object]
_numbers = itertools.count()


@dataclass(kw_only=True, eq=False)
class ServedJob:
    """One sequence: a tokenized prompt with its clips."""

    tokens: Int32[np.ndarray, " L"]
    """The prompt, with one placeholder id for each clip."""
    clips: tuple[Clip, ...] = ()
    limit: int
    """Largest number of new tokens."""
    sampling: Sampling = Sampling()
    report: Report
    """Called in the device thread, with all tokens so far; must return at once."""
    is_streamed: bool = False
    """Whether somebody waits for each token."""
    is_cancelled: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    submitted_s: float = field(default_factory=time.monotonic)
    sent: int = 0
    """Tokens that were reported."""


@dataclass
class SchedulerCounts:
    """What the scheduler has done and is doing; other threads may read it."""

    waiting: int = 0
    running: int = 0
    tokens: int = 0
    steps: int = 0
    """Calls of `decode`."""
    occupied: int = 0
    """Sum of the occupied slots over all calls of `decode`."""
    encoded_clips: int = 0
    encoded_s: float = 0.0
    reused_clips: int = 0
    faults: int = 0
