"""What a chat template may spend: a budget that every step which makes a value pays from.

A template comes with a downloaded model. The sandbox keeps it from running code; the budget keeps
it from running for hours and from filling the memory. No value may be larger than the budget's
`largest`, no step may make one before its size is known, and all steps together end.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError

MAX_SOURCE = 1 << 18
"""Characters of a template; the longest ones in use have some 30,000."""
LARGEST, LARGEST_PER_CHARACTER = 1 << 20, 16
"""Size of a value: 2^20, and 16 for each character of the dialog."""
WORK, WORK_PER_CHARACTER, STEP = 1 << 22, 1 << 8, 16
"""Sizes of all values that one rendering makes, where each step counts 16 more."""
MAX_SECONDS = 10.0
WORK_PER_LOOK = 1 << 10
"""Between two looks at the clock."""
MAX_DEPTH = 64
"""Lists within lists."""
MAX_INTEGER = 10_000
"""Widths, counts and numbers of digits."""
MAX_BITS = 1 << 14
"""Of an integer that is a product or a power."""
_CONTAINERS = (Sequence, Set, ValuesView)
_WIDE = re.compile(r"%[-#0 +.]*(\d+\.)?(\d{4}|\*)|\{[^{}]*\{|\{[^{}]*:[^{}]*\d{4}")
"""A format's width that has four digits or more, or comes from another value."""


@dataclass
class Budget:
    """What is left of one rendering."""

    largest: int
    work: int
    deadline_s: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)
    next_look: int = field(init=False)
    """The clock is looked at when less work is left."""

    def __post_init__(self) -> None:
        self.next_look = self.work - WORK_PER_LOOK

    def check(self, size: int) -> None:
        """Raises SecurityError for a value of a size that is too large, or with nothing left."""
        if size > self.largest or self.work < 0 or time.monotonic() > self.deadline_s:
            self.refuse(size)
        self.next_look = self.work - WORK_PER_LOOK

    def refuse(self, size: int) -> NoReturn:
        """Raises SecurityError for a value of this size."""
        if size > self.largest:
            raise SecurityError(f"makes a value of more than {self.largest} characters")
        raise SecurityError("takes too many steps")


_BUDGET: ContextVar[Budget] = ContextVar("budget of a chat template")


@contextmanager
def budget(characters: int = 0) -> Iterator[Budget]:
    """Gives what runs inside a new budget, for a dialog of so many characters."""
    own = Budget(
        largest=LARGEST + LARGEST_PER_CHARACTER * characters,
        work=WORK + WORK_PER_CHARACTER * characters,
    )
    token = _BUDGET.set(own)
    try:
        yield own
    finally:
        _BUDGET.reset(token)


def spend(size: int = 0) -> None:
    """Pays for a step that makes a value of this size. Raises SecurityError with nothing left."""
    own = _BUDGET.get()
    own.work -= STEP + size
    if size > own.largest or own.work < own.next_look:
        own.check(size)


def size_of(value: Any) -> int:
    """Characters of a value, and 16 for each element of lists and mappings, with all inside.

    Raises SecurityError where it is larger than the budget's largest value or nested too deeply.
    """
    if isinstance(value, str):
        return len(value)
    largest, size, todo = _BUDGET.get().largest, 0, [(value, 0)]
    while todo:
        one, depth = todo.pop()
        size += STEP
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, Mapping):
            todo += [(part, depth + 1) for item in one.items() for part in item]
        elif isinstance(one, _CONTAINERS) and not isinstance(one, range):
            todo += [(part, depth + 1) for part in one]
        if size + STEP * len(todo) > largest or depth > MAX_DEPTH:
            raise SecurityError(f"makes a value of more than {largest} characters")
    return size


def paid(value: Any) -> Any:
    """Pays for a value that was just made; iterators become lists."""
    if type(value) is str:
        spend(len(value))
        return value
    if isinstance(value, Iterator):
        value = listed(value)
    spend(size_of(value))
    return value


def listed(values: Iterable[Any]) -> list[Any]:
    """The values of an iterator, each paid for."""
    found = []
    for value in values:
        spend()
        found.append(value)
    return found


def check_integers(values: Iterable[Any]) -> None:
    """Raises SecurityError for an integer above MAX_INTEGER, which would be a width or a count."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise SecurityError(f"gives a number above {MAX_INTEGER} to a filter or a method")


def check_format(text: str, values: Any, marks: str) -> None:
    """Raises SecurityError for a format with a width above 999, or whose result is too large."""
    if _WIDE.search(text):
        raise SecurityError("formats with a width that is too large")
    spend(len(text) + text.count(marks) * (1000 + size_of(values)))


def replaced_size(text: str, old: str, new: str, *_: Any) -> int:
    """The most characters of `text.replace(old, new)`."""
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def joined_size(separator: str, values: Sequence[Any]) -> int:
    """Characters of `separator.join(values)`."""
    return size_of(values) + len(separator) * len(values)


def multiplied(left: Any, right: Any) -> Any:
    """`left * right`."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(int(left).bit_length() + int(right).bit_length())
        spend()
        return left * right
    if isinstance(left, int):
        left, right = right, left
    if isinstance(right, int) and not isinstance(left, float | complex):
        spend(size_of(left) * max(int(right), 0))
    return left * right


def raised(left: Any, right: Any) -> Any:
    """`left ** right`."""
    if isinstance(left, int) and isinstance(right, int) and right > 0:
        _check_bits(int(left).bit_length() * int(right))
    spend()
    return left**right


def added(left: Any, right: Any) -> Any:
    """`left + right`."""
    if type(left) is str and type(right) is str:
        spend(len(left) + len(right))
        return left + right
    spend(0 if isinstance(left, int | float) else size_of(left) + size_of(right))
    return left + right


def remainder(left: Any, right: Any) -> Any:
    """`left % right`, which formats where `left` is a text."""
    if isinstance(left, str):
        check_format(left, right, "%")
    spend()
    return left % right


def concatenated(texts: Iterable[str]) -> str:
    """`"".join(texts)`."""
    found = list(texts)
    spend(sum(map(len, found)))
    return "".join(found)


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"makes an integer of more than {MAX_BITS} bits")


Operator = Callable[[Any, Any], Any]
OPERATORS: Mapping[str, Operator] = {
    "+": added,
    "*": multiplied,
    "**": raised,
    "%": remainder,
}
"""The operators that can make something large of something small."""
