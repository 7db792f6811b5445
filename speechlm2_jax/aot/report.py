"""Cost estimate of a compiled program on one chip: memory, FLOPs, traffic, least time."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from speechlm2_jax.aot.chips import Chip
from speechlm2_jax.aot.collectives import Collective


@dataclass(frozen=True, kw_only=True)
class Report:
    """One program on one topology; everything is per chip."""

    program: str
    topology: str
    mesh: str
    shape: str
    memory: Mapping[str, int]
    """Bytes by category."""
    chip: Chip
    flops_per_s: float
    """Peak of the chip."""
    flops: float
    """By formula (`networks.flops`): model FLOPs without rematerialisation."""
    read_bytes: float
    """Weights and caches read from memory; it bounds the time of programs with few FLOPs."""
    collectives: tuple[Collective, ...]
    compiled_in_s: float

    @property
    def total_bytes(self) -> int:
        """All memory."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether it fits into the chip's memory."""
        return self.total_bytes <= self.chip.memory_bytes

    @property
    def compute_s(self) -> float:
        """Least time for arithmetic, or for reading memory if that takes longer."""
        return max(self.flops / self.flops_per_s, self.read_bytes / self.chip.memory_bytes_per_s)

    @property
    def traffic_s(self) -> float:
        """Least time of the collectives."""
        return sum(c.bytes_sent for c in self.collectives) / self.chip.link_bytes_per_s

    @property
    def step_s(self) -> tuple[float, float]:
        """Least time of a run: collectives overlapped with compute, and not overlapped."""
        return max(self.compute_s, self.traffic_s), self.compute_s + self.traffic_s

    def to_json(self) -> str:
        """All figures, one line."""
        values: dict[str, Any] = asdict(self)
        values |= {
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "compute_s": self.compute_s,
            "traffic_s": self.traffic_s,
            "step_s": self.step_s,
        }
        return json.dumps(values)

    def table(self) -> str:
        """All figures as a table."""
        lines = [f"{self.program} on {self.topology} ({self.mesh}), {self.shape}; per chip:"]
        rows = [(name, _size(size)) for name, size in self.memory.items()]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        share = f"{_size(self.total_bytes)} of {_size(self.chip.memory_bytes)}"
        rows.append(("memory", f"{share}: {verdict}"))
        rows.append(("model FLOPs", f"{self.flops / 1e12:.2f} T"))
        rows += [(c.kind, f"{c.count} x, {_size(c.bytes_sent)} sent") for c in self.collectives]
        low, high = (1e3 * s for s in self.step_s)
        least = f"{1e3 * self.compute_s:.1f} ms at peak, {1e3 * self.traffic_s:.1f} ms of traffic"
        rows.append(("a run takes at least", f"{least}: {low:.1f} to {high:.1f} ms"))
        width = max(len(name) for name, _ in rows)
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
