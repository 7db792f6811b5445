"""What is planned, and for which device."""

from dataclasses import dataclass
from pathlib import Path

from speechlm2_jax.settings import SettingsError

BUCKETS = 8
"""Bins where neither the command nor the configuration names any; each is a program to compile."""

FRACTION = 0.9
FRACTION_OF_CPU = 0.6
"""Less, as the kernels of CPUs take scratch that the compiler does not tell, about a quarter more,
and the process holds data and libraries in the same memory."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of the command."""

    buckets: int | None = None
    """Bins that are estimated; None: those of the configuration, or BUCKETS."""
    buckets_2d: tuple[int, int] | None = None
    """Bins of input lengths, and of output lengths for each."""
    memory_gib: float | None = None
    """Memory of a device; None: the device's own."""
    memory_fraction: float | None = None
    """Share of it that a program may need; None: FRACTION, or FRACTION_OF_CPU."""
    max_rows: int | None = None
    """Most rows of any bin."""
    is_timed: bool = True
    """Whether the programs are run, where they were compiled for the devices at hand."""
    topology: str | None = None
    """TPUs to compile for that are not attached."""
    libtpu: Path | None = None
    """The folder that `aot.fetch` filled."""

    def __post_init__(self) -> None:
        if self.buckets is not None and self.buckets_2d is not None:
            raise SettingsError("--buckets and --buckets-2d: give one of them")
        counts = (*(self.buckets_2d or ()), self.buckets, self.max_rows)
        if any(count is not None and count < 1 for count in counts):
            raise SettingsError("--buckets, --buckets-2d and --max-rows must be at least 1")
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise SettingsError(
                f"--memory-fraction must be above 0 and at most 1, got {self.memory_fraction}"
            )
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise SettingsError(f"--memory-gib must be positive, got {self.memory_gib}")

    def fraction_on(self, platform: str) -> float:
        """Share of the memory of devices of a platform (cpu, gpu, tpu) that a program may need."""
        if self.memory_fraction is not None:
            return self.memory_fraction
        return FRACTION_OF_CPU if platform == "cpu" else FRACTION


def parse_pair(text: str) -> tuple[int, int]:
    """The two numbers of `--buckets-2d N,M`. Raises SettingsError."""
    first, _, second = text.partition(",")
    if not (first.strip().isdigit() and second.strip().isdigit()):
        raise SettingsError(f"--buckets-2d: expected two numbers as in 5,3, got {text!r}")
    return int(first), int(second)
