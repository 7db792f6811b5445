"""A checkpoint at a glance: every tensor with its shape and dtype, and what looks wrong in it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from speechlm2_jax.conversion.readers.source import TensorSource


class Line(NamedTuple):
    """One tensor, or one further name of it."""

    name: str
    shape: str
    dtype: str
    note: str

    @property
    def is_suspect(self) -> bool:
        """True if the values deserve a look."""
        return bool(self.note) and not self.note.startswith(SAME)


SAME = "same tensor as"
SAMPLE = 1024


def lines(source: TensorSource) -> Iterator[Line]:
    """Reads the tensors one at a time, in order of name, and notes what a user should know.

    A weight that is all zeros or constant was probably never trained or never loaded.
    """
    aliases = {alias: name for alias, name in source.aliases.items() if name in source.infos}
    for name in sorted([*source.infos, *aliases]):
        if name in aliases:
            yield Line(name, "", "", f"{SAME} {aliases[name]}")
            continue
        info = source.infos[name]
        note = remark(source.read(name))
        yield Line(name, str(list(info.shape)), str(info.dtype), note)


def remark(values: np.ndarray) -> str:
    """Notes values that are not finite, all zero or all equal; "" if none of these."""
    if values.size == 0:
        return "empty"
    if values.dtype.kind not in "biuc":
        values = values.astype(np.float32) if values.dtype.itemsize < 4 else values
        if not np.isfinite(values).all():
            return "not finite"
    first = values.flat[0]
    if values.size == 1 or not (values == first).all():
        return ""
    return "all zeros" if first == 0 else f"constant {first:g}"


def looks_finite(values: np.ndarray) -> bool:
    """Whether some 1,024 values, evenly spaced, are finite: what a diverged training leaves shows.

    Reading all values would take as long as loading them.
    """
    if values.dtype.kind in "biu" or not values.flags.c_contiguous:
        return True
    sample = values.reshape(-1)[:: max(1, values.size // SAMPLE)]
    if sample.dtype.itemsize < 4:
        sample = sample.astype(np.float32)
    return bool(np.isfinite(sample).all())


def table(source: TensorSource) -> str:
    """The lines in columns, with the totals below."""
    rows = list(lines(source))
    columns = list(zip(*rows, strict=True)) or [()] * len(Line._fields)
    widths = [max((len(cell) for cell in column), default=0) for column in columns]
    body = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    size = sum(info.size_bytes for info in source.infos.values())
    wrong = sum(row.is_suspect for row in rows)
    return "\n".join([*body, f"{len(source.infos)} tensors, {size} bytes, {wrong} with a remark"])
