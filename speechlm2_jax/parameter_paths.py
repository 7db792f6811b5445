"""Selects parameters by NeMo-style name patterns: what is trained and what is frozen.

Patterns are matched (`re.match`) against foreign names, one per slice of a stacked variable, so
that `^llm.model.layers.[0-3]` freezes four layers of one stack. `conversion` gives the
names; this module knows none.

Patterns may come from a downloaded config.json, so their search has limits: `re` decides what a
pattern is, and `regex`, which can stop in the middle of a search, does the matching.
"""

import difflib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import regex

SHOWN = 5
SEARCH_S = 5.0
"""Processor time that all patterns of a model may take together; NeMo's own take milliseconds."""
MAX_DIGITS = 9
MAX_SHOWN = 200
"""Characters of a pattern that an error shows."""
MAX_SIZE = 100_000
"""Characters of a pattern with its counted repeats written out: what `regex` holds in memory."""
_COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_LITERAL_BRACE = re.compile(r"((?<!\\)(?:\\\\)*)\{(?!\d*,?\d*\})")
"""A brace that `re` takes as it is, and `regex` for the start of an approximate match."""


class PatternError(ValueError):
    """A pattern that selects nothing, takes too long, or is no regular expression."""


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
    Raises PatternError for a pattern that matches no name at all, and for one whose search takes
    longer than `SEARCH_S`, which all patterns share.
    """
    slices = list(slices)
    deadline = time.process_time() + SEARCH_S
    frozen = _matched("freeze_params", freeze, slices, deadline)
    kept = _matched("prevent_freeze_params", prevent, slices, deadline)
    fixed = [re.compile(pattern) for pattern in always]
    rows: dict[str, dict[int, bool]] = {}
    for s in slices:
        if s.is_parameter:
            trained = s.name not in frozen.names or s.name in kept.names
            trained = trained and not any(pattern.match(s.name) for pattern in fixed)
            rows.setdefault(s.path, {})[s.layer or 0] = trained
    trainable = {path: _mask(row) for path, row in rows.items()}
    return Selection(trainable, (*frozen.notes, *kept.notes))


def matching(patterns: Iterable[str], slices: Sequence[NamedSlice]) -> list[str]:
    """The patterns that match a name. Raises PatternError as `select` does, but for no match."""
    found: list[str] = []
    for pattern in patterns:
        deadline = time.process_time() + SEARCH_S
        expression = _compiled("freeze_params", pattern)
        if any(_matches(expression, s.name, deadline) for s in slices):
            found.append(pattern)
    return found


@dataclass(frozen=True)
class _Matches:
    names: frozenset[str]
    notes: tuple[str, ...]


def _matched(
    key: str, patterns: Sequence[str], slices: Sequence[NamedSlice], deadline: float
) -> _Matches:
    names: set[str] = set()
    notes: list[str] = []
    for pattern in dict.fromkeys(patterns):
        expression = _compiled(key, pattern)
        try:
            hits = [s for s in slices if _matches(expression, s.name, deadline)]
        except TimeoutError as error:
            raise PatternError(
                f"{key}: {_shown(pattern)} takes more than {SEARCH_S:g} s to match; write it "
                "without a repeat inside a repeat"
            ) from error
        if not hits:
            raise PatternError(_no_match(key, pattern, [s.name for s in slices]))
        names.update(s.name for s in hits)
        if not any(s.is_parameter for s in hits):
            shown = ", ".join(s.name for s in hits[:SHOWN])
            notes.append(f"{key}: {pattern!r} matches only buffers or tied aliases ({shown})")
    return _Matches(frozenset(names), tuple(notes))


def _compiled(key: str, pattern: str) -> "regex.Pattern[str]":
    """The pattern as `regex` takes it, after `re` accepted it: both then mean the same."""
    counts = [int(n[:MAX_DIGITS] or 1) or 1 for pair in _COUNTED.findall(pattern) for n in pair]
    if math.prod(counts) * len(pattern) > MAX_SIZE:
        raise PatternError(
            f"{key}: {_shown(pattern)} is too long, with its repeats written out; list layers by "
            "a set of digits"
        )
    if "[:" in pattern and ":]" in pattern:
        raise PatternError(
            f"{key}: {_shown(pattern)} has a POSIX class ([:alpha:]), which Python's re does not "
            "know; write the characters, [A-Za-z]"
        )
    try:
        re.compile(pattern)
        return regex.compile(_LITERAL_BRACE.sub(r"\1\\{", pattern), regex.V0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{key}: {_shown(pattern)} is no regular expression: {error}") from error


def _matches(expression: "regex.Pattern[str]", name: str, deadline: float) -> bool:
    """`re.match`, until `deadline` of the process's clock. Raises TimeoutError beyond it."""
    left = deadline - time.process_time()
    if left <= 0:
        raise TimeoutError
    return expression.match(name, timeout=left) is not None


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= MAX_SHOWN else f"{pattern[:MAX_SHOWN]}...")


def _no_match(key: str, pattern: str, names: Sequence[str]) -> str:
    plain = re.sub(r"\\d[+*]?|[\\^$+*?()\[\]|]", "", pattern[:MAX_SHOWN])
    near = difflib.get_close_matches(plain, names, n=SHOWN, cutoff=0.3) or list(names[:SHOWN])
    return f"{key}: {_shown(pattern)} matches no parameter; the nearest names are {', '.join(near)}"


def _mask(row: Mapping[int, bool]) -> bool | np.ndarray:
    values = [row[layer] for layer in sorted(row)]
    return values[0] if len(set(values)) == 1 else np.array(values, bool)
