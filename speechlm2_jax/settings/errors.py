# pyright: reportUnknownArgumentType=false
"""SettingsError, and how its messages name paths, keys and values."""

import difflib
from collections.abc import Iterable
from typing import Any


class SettingsError(ValueError):
    """A setting that cannot be used: one line with its dotted path and the fix."""


class HostileTextError(SettingsError):
    """A text that asks for objects, or expands without end; nothing of it was carried out."""


def join(where: str, key: object) -> str:
    """The dotted path of a key."""
    return f"{where}.{key}" if where else str(key)


def kind(value: Any) -> str:
    """What a value is, for a reader of YAML."""
    if value is None:
        return "null"
    names = {dict: "a mapping", list: "a list"}
    return names.get(type(value), f"{value!r} ({type(value).__name__})")


def unknown(path: str, key: str, valid: Iterable[str]) -> str:
    """The message for a key that is not there: the nearest name, else all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return f"{path}: unknown key; did you mean {near[0]!r}?"
    return f"{path}: unknown key; valid keys: {', '.join(names) or 'none'}"
