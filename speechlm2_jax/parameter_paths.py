"""Selects parameters by NeMo-style name patterns: what is trained and what is frozen.

Patterns are matched (`re.match`) against foreign names, one per slice of a stacked variable, so
that `^llm.model.layers.[0-3]` freezes four layers of one stack. `conversion` gives the
names; this module knows none.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHOWN = 5


class PatternError(ValueError):
    """A pattern that selects nothing, or is no regular expression."""


@dataclass(frozen=True)
class NamedSlice:
    """One foreign name and what it names here."""

    name: str
    path: str
    """Dotted path of our variable."""
    layer: int | None
    """Which slice of a stacked variable, or None for the whole."""
    is_buffer: bool
    is_alias: bool
    """True for a further name of a tensor whose own name is another (tied weights)."""

    @property
    def is_parameter(self) -> bool:
        """True if training can depend on this name."""
        return not (self.is_buffer or self.is_alias)


@dataclass(frozen=True)
class Selection:
    """What training changes."""

    trainable: Mapping[str, bool | np.ndarray]
    """Parameter path -> True, False, or a bool mask over the layers of a partly frozen stack."""
    notes: tuple[str, ...]
    """What the patterns leave to say, once each: those that match only buffers or aliases."""


def select(
    slices: Iterable[NamedSlice],
    freeze: Sequence[str],
    prevent: Sequence[str],
    always: Sequence[str] = (),
) -> Selection:
    """Applies `freeze_params` and `prevent_freeze_params` as NeMo does.

    A parameter is trained if no `freeze` pattern matches its name or a `prevent` pattern does; what
    an `always` pattern matches has no gradient and is never trained. Buffers are in no result.
    Raises PatternError for a pattern that matches no name at all.
    """
    slices = list(slices)
    frozen = _matched("freeze_params", freeze, slices)
    kept = _matched("prevent_freeze_params", prevent, slices)
    fixed = [re.compile(pattern) for pattern in always]
    rows: dict[str, dict[int, bool]] = {}
    for s in slices:
        if s.is_parameter:
            trained = s.name not in frozen.names or s.name in kept.names
            trained = trained and not any(pattern.match(s.name) for pattern in fixed)
            rows.setdefault(s.path, {})[s.layer or 0] = trained
    trainable = {path: _mask(row) for path, row in rows.items()}
    return Selection(trainable, (*frozen.notes, *kept.notes))


@dataclass(frozen=True)
class _Matches:
    names: frozenset[str]
    notes: tuple[str, ...]


def _matched(key: str, patterns: Sequence[str], slices: Sequence[NamedSlice]) -> _Matches:
    names: set[str] = set()
    notes: list[str] = []
    for pattern in dict.fromkeys(patterns):
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise PatternError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        hits = [s for s in slices if expression.match(s.name)]
        if not hits:
            raise PatternError(_no_match(key, pattern, [s.name for s in slices]))
        names.update(s.name for s in hits)
        if not any(s.is_parameter for s in hits):
            shown = ", ".join(s.name for s in hits[:SHOWN])
            notes.append(f"{key}: {pattern!r} matches only buffers or tied aliases ({shown})")
    return _Matches(frozenset(names), tuple(notes))


def _no_match(key: str, pattern: str, names: Sequence[str]) -> str:
    plain = re.sub(r"\\d[+*]?|[\\^$+*?()\[\]|]", "", pattern)
    near = difflib.get_close_matches(plain, names, n=SHOWN, cutoff=0.3) or list(names[:SHOWN])
    return f"{key}: {pattern!r} matches no parameter; the nearest names are {', '.join(near)}"


def _mask(row: Mapping[int, bool]) -> bool | np.ndarray:
    values = [row[layer] for layer in sorted(row)]
    return values[0] if len(set(values)) == 1 else np.array(values, bool)
