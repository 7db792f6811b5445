"""What became of each tensor of a checkpoint when it was loaded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from speechlm2_jax.conversion.errors import listed
from speechlm2_jax.conversion.mapping import Table, accepted_names
from speechlm2_jax.conversion.readers.source import TensorSource
from speechlm2_jax.conversion.wrappers import unwrapped
from speechlm2_jax.layers.module import VariableInfo


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many tensors were loaded, and why the others were not."""

    loaded: int
    copies: tuple[str, ...]
    """Further copies of tensors that were loaded by another name (tied weights)."""
    ignored: Mapping[str, tuple[str, ...]]
    """Reason -> names of the tensors that the table leaves out."""

    @property
    def total(self) -> int:
        """Number of tensors in the checkpoint."""
        return self.loaded + len(self.copies) + sum(map(len, self.ignored.values()))

    def lines(self) -> list[str]:
        """The report: one line, and one more for copies and for each reason."""
        report = [f"loaded: {self.loaded} of {self.total} tensors"]
        if self.copies:
            report.append(f"equal copies: {len(self.copies)} ({listed(self.copies)})")
        for reason, names in self.ignored.items():
            report.append(f"ignored: {len(names)} ({listed(names)}): {reason}")
        return report


def coverage(source: TensorSource, table: Table, infos: Mapping[str, VariableInfo]) -> Coverage:
    """Counts the tensors of a checkpoint that `mapping.load` accepts. Reads no value."""
    target_of = accepted_names(table, infos)
    source = unwrapped(source, target_of)
    filled: set[tuple[str, int | None]] = set()
    copies: list[str] = []
    ignored: dict[str, tuple[str, ...]] = {}
    for name in sorted(source.infos):
        slot = target_of.get(name)
        if slot is None:
            reason = next(i.reason for i in table.ignored if re.fullmatch(i.pattern, name))
            ignored[reason] = (*ignored.get(reason, ()), name)
        elif slot in filled:
            copies.append(name)
        else:
            filled.add(slot)
    return Coverage(loaded=len(filled), copies=tuple(copies), ignored=ignored)
