"""Wall time by kind, and throughput between two log lines."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

COMPUTE = "compute"
KINDS = (
    "importing",
    "starting",
    "data_wait",
    "compiling",
    "validation",
    "validation_data_wait",
    "saving",
    "rest",
)
"""Kinds of time that are measured; all other wall time is compute."""
BEFORE_TRAINING = ("importing", "starting", "compiling")
"""Kinds of time that occur once. The estimate of the remaining time leaves them out."""
PACE_STEPS = 20
"""The progress bar shows the mean speed of this many steps."""
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L4", 121e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),  # half of a chip, which is two devices
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)
"""(Part of the name of a device kind, its dense bf16 FLOP/s). The first match counts."""


def peak_flops(kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device kind; None if it is unknown, as for CPUs."""
    return next((peak for part, peak in PEAK_FLOPS if part in kind), None)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Throughput since the last log line, as fields of its row."""

    tokens_per_s_per_device: float
    mfu: float | None
    data_wait_share: float
    padding: float
    step_time_s: float


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Recent speed, for the progress bar."""

    steps_per_s: float
    tokens_per_s: float
    """Tokens of all devices together."""
    left_s: float | None
    """Estimated seconds to the end, validations and saving included; None if unknown."""


@dataclass
class _Window:
    """Counts since the last log line."""

    steps: int = 0
    tokens: int = 0
    padded: int = 0
    flops: float = 0.0
    times: dict[str, float] = field(default_factory=dict)


class Throughput:
    """Adds up time by kind, tokens and FLOPs. One per process and run."""

    def __init__(self, device_kinds: Sequence[str], clock: Callable[[], float] = time.perf_counter):
        """`device_kinds` names the kind of each device of the mesh."""
        self._clock, self._devices = clock, len(device_kinds)
        self._peak = peak_flops(device_kinds[0])
        self._kind: str = COMPUTE
        self._since = self._clock()
        self._spent: dict[str, float] = {kind: 0.0 for kind in (COMPUTE, *KINDS)}
        self._window = _Window(times=dict(self._spent))
        self._steps = self._tokens = 0
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=PACE_STEPS + 1)
        self.on_change: Callable[[str], object] = lambda kind: None
        """Called with the kind of time that begins."""

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Counts the time inside the context as `kind`. If nested, the inner kind counts."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def add(self, kind: str, seconds: float) -> None:
        """Counts time that passed before this object was made."""
        self._spent[kind] += seconds

    def add_batch(self, *, tokens: int, padded: int, flops: float) -> None:
        """Counts one micro-batch: tokens without padding, all tokens, model FLOPs."""
        self._tokens += tokens
        self._window.tokens += tokens
        self._window.padded += padded
        self._window.flops += flops

    def add_step(self) -> None:
        """Counts one optimizer step."""
        self._switch(self._kind)
        self._steps += 1
        self._window.steps += 1
        training_s = self._spent[COMPUTE] + self._spent["data_wait"]
        self._marks.append((training_s, self._steps, self._tokens))

    def pace(self, steps_left: int | None) -> Pace | None:
        """Speed over the last steps; None before the second step."""
        if len(self._marks) < 2:
            return None
        (start_s, first, tokens), (end_s, last, more) = self._marks[0], self._marks[-1]
        seconds = max(end_s - start_s, 1e-9)
        spent = self.totals()
        repeated_s = sum(s for kind, s in spent.items() if kind not in BEFORE_TRAINING)
        return Pace(
            steps_per_s=(last - first) / seconds,
            tokens_per_s=(more - tokens) / seconds,
            left_s=None if steps_left is None else steps_left * repeated_s / self._steps,
        )

    def rates(self) -> Rates:
        """Throughput since the last call. Time of compiling, validation and saving is excluded."""
        self._switch(self._kind)
        window, now = self._window, dict(self._spent)
        waited = now["data_wait"] - window.times["data_wait"]
        train_s = max(now[COMPUTE] - window.times[COMPUTE] + waited, 1e-9)
        self._window = _Window(times=now)
        per_device = train_s * self._devices
        return Rates(
            tokens_per_s_per_device=window.tokens / per_device,
            mfu=None if self._peak is None else window.flops / per_device / self._peak,
            data_wait_share=waited / train_s,
            padding=1 - window.tokens / window.padded if window.padded else 0.0,
            step_time_s=train_s / max(window.steps, 1),
        )

    def totals(self) -> dict[str, float]:
        """Seconds since the start, by kind."""
        self._switch(self._kind)
        return dict(self._spent)

    def _switch(self, kind: str) -> str:
        """Adds the time since the last switch to the current kind, then makes `kind` current.

        Returns the kind that was current.
        """
        now = self._clock()
        self._spent[self._kind] += now - self._since
        before, self._kind, self._since = self._kind, kind, now
        self.on_change(kind)
        return before
