"""Plain values <-> frozen dataclasses, strictly: every key and type is checked, nothing is guessed.

Optional class variables of a dataclass list the foreign keys that it accepts or refuses:

    IGNORED: ClassVar[Mapping[str, Refusal]]   key -> why it means nothing here; reported once
    REFUSED: ClassVar[Mapping[str, Refusal]]   key -> message; or (message, harmless value, ...)
    ALIASES: ClassVar[Mapping[str, str]]       old key -> field
    TARGETS: ClassVar[tuple[str, ...]]         last components that `_target_` or `target` may name

A class method `check_first(values, where)` sees the plain values before their keys are looked at.
It may raise SettingsError, and call `report_ignored`.
A refused key is accepted while it asks for nothing: null, false, 0, empty, or a harmless value; an
ignored one with harmless values is not reported then.
A field called `target` receives the last component of `_target_`.
"""

import dataclasses
import types
import typing
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from speechlm2_jax.settings.errors import SettingsError, join, kind, unknown
from speechlm2_jax.settings.read import MISSING, Plain

Refusal = str | tuple[Any, ...]
"""A message, or (message, harmless value, ...)."""
C = TypeVar("C")
_NONE = dataclasses.MISSING
_TARGET_KEYS = ("_target_", "target")
_SEQUENCES = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)
_ignored: ContextVar[dict[str, str] | None] = ContextVar("_ignored", default=None)
"""The open report. It is no argument, because blocks are built inside public constructors (models,
DataModule, Trainer), all of which would have to take it and hand it on."""


@contextmanager
def ignored_report() -> Generator[dict[str, str]]:
    """Collects, while open, the ignored keys that `build` meets: dotted path -> reason."""
    report: dict[str, str] = {}
    token = _ignored.set(report)
    try:
        yield report
    finally:
        _ignored.reset(token)


def report_ignored(path: str, reason: str) -> None:
    """Adds a key without effect to the report that is open, if any."""
    report = _ignored.get()
    if report is not None:
        report[path] = reason


def check_first(cls: type[Any], values: Mapping[str, Any], where: str) -> None:
    """Lets a class look at its values before their keys are. Raises SettingsError."""
    check = getattr(cls, "check_first", None)
    if check is not None:
        check(values, where)


def build(cls: type[C], values: object, where: str = "") -> C:
    """Makes a dataclass of a mapping of plain values; `where` is its dotted path, for messages.

    Raises SettingsError for a key that `cls` does not have, a value of another type, a missing
    field, or whatever ValueError the class itself raises.
    """
    if not isinstance(values, Mapping):
        raise SettingsError(f"{where}: expected a mapping of keys, got {kind(values)}")
    check_first(cls, cast(Plain, values), where)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    hints = typing.get_type_hints(cls)
    arguments: Plain = {}
    for key, value in cast(Plain, values).items():
        path = join(where, key)
        name = field_of(cls, fields, key, value, path)
        if name is None:
            continue
        if name in arguments:
            raise SettingsError(f"{path}: sets {name!r} a second time; keep one of the two names")
        if key in _TARGET_KEYS and name == "target" and _table(cls, "TARGETS"):
            value = str(value).rpartition(".")[2]
        arguments[name] = _convert(hints[name], value, path)
    for name, field in fields.items():
        has_default = field.default is not _NONE or field.default_factory is not _NONE
        if name not in arguments and not has_default:
            raise SettingsError(f"{join(where, name)}: required ({_describe(hints[name])})")
    try:
        return cls(**arguments)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{where}: {error}" if where else str(error)) from error


def to_plain(value: object) -> Any:
    """The inverse of `build`: dataclasses become dicts and tuples lists, ready for YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(v) for v in cast(Iterable[Any], value)]
    return str(value) if isinstance(value, Path) else value


def defaults(cls: type[Any]) -> Plain:
    """The fields of a dataclass as plain values, `???` where one must be given."""
    result: Plain = {}
    for field in dataclasses.fields(cls):
        if field.default is not _NONE:
            result[field.name] = to_plain(field.default)
        elif field.default_factory is not _NONE:
            result[field.name] = to_plain(field.default_factory())
        else:
            result[field.name] = MISSING
    return result


def _table(cls: type[Any], name: str) -> Any:
    return getattr(cls, name, {})


def field_of(
    cls: type[Any], fields: Mapping[str, object], key: str, value: object, path: str
) -> str | None:
    """The field that a key sets, or None if the key is knowingly without effect."""
    targets = _table(cls, "TARGETS")
    if key in _TARGET_KEYS and targets:
        if not isinstance(value, str) or value.rpartition(".")[2] not in targets:
            raise SettingsError(f"{path}: unsupported {kind(value)}; use {' or '.join(targets)}")
        return "target" if "target" in fields else None
    key = _table(cls, "ALIASES").get(key, key)
    if key in fields:
        return key
    refused, ignored = _table(cls, "REFUSED"), _table(cls, "IGNORED")
    if key in refused:
        message, harmless = _refusal(refused[key])
        if value and value not in harmless:
            raise SettingsError(f"{path}: {message} (got {value!r})")
        return None
    if key in ignored:
        message, harmless = _refusal(ignored[key])
        if not (harmless and (not value or value in harmless)):
            report_ignored(path, message)
        return None
    valid = {*fields, *_table(cls, "ALIASES"), *refused, *ignored}
    raise SettingsError(unknown(path, str(key), valid))


def _refusal(given: Refusal) -> tuple[str, tuple[Any, ...]]:
    """The message of an entry, and the values that ask for nothing."""
    return (given[0], given[1:]) if isinstance(given, tuple) else (given, ())


def _convert(hint: object, value: Any, path: str) -> Any:
    """A plain value as the annotated type. Raises SettingsError naming both."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, options, value, path)
    if origin is Literal:
        for option in options:
            if option == value and type(option) is type(value):
                return option
    elif dataclasses.is_dataclass(hint):
        return value if isinstance(value, cast(Any, hint)) else build(cast(Any, hint), value, path)
    elif (origin or hint) in _SEQUENCES and isinstance(value, list | tuple):
        return _convert_sequence(hint, options, cast(Sequence[Any], value), path)
    elif (origin or hint) in _MAPPINGS and isinstance(value, Mapping):
        item = options[1] if options else Any
        pairs = cast(Mapping[str, Any], value).items()
        return {str(k): _convert(item, v, join(path, k)) for k, v in pairs}
    else:
        converted = _scalar_as(hint, value)
        if converted is not _NONE:
            return converted
    raise SettingsError(f"{path}: expected {_describe(hint)}, got {kind(value)}")


def _convert_union(hint: object, options: tuple[Any, ...], value: Any, path: str) -> Any:
    if any(o is Any or type(value) is o for o in options):
        return value
    form = dict if isinstance(value, Mapping) else list if isinstance(value, list | tuple) else None
    fitting = by_target([o for o in options if _form(o) is form], value, path)
    inner: SettingsError | None = None
    for option in fitting:
        try:
            return _convert(option, value, path)
        except SettingsError as error:
            inner = inner or error
    if inner is not None and form is not None:  # the inner error is more specific
        raise inner
    raise SettingsError(f"{path}: expected {_describe(hint)}, got {kind(value)}")


def by_target(options: list[object], value: Any, path: str) -> list[Any]:
    """Of several dataclasses, the one whose TARGETS name the `_target_` that is given."""
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    targets = {name: c for c in classes for name in _table(cast(type[Any], c), "TARGETS")}
    if len(options) < 2 or not targets or not isinstance(value, Mapping):
        return options
    values = cast(Plain, value)
    key = next((k for k in _TARGET_KEYS if isinstance(values.get(k), str)), None)
    if key is None:
        return options
    name = values[key].rpartition(".")[2]
    if name not in targets:
        raise SettingsError(
            f"{join(path, key)}: unsupported {kind(values[key])}; use {' or '.join(targets)}"
        )
    return [targets[name]]


def is_union(hint: object) -> bool:
    """Whether a type is one of several."""
    return typing.get_origin(hint) in (Union, types.UnionType)


def has_keys(hint: object, value: object) -> bool:
    """Whether a value could be of a type that is a dataclass, or a list."""
    form = dict if isinstance(value, Mapping) else list if isinstance(value, list | tuple) else None
    return form is not None and _form(hint) is form


def _form(hint: object) -> type | None:
    origin = typing.get_origin(hint) or hint
    if dataclasses.is_dataclass(hint) or origin in _MAPPINGS:
        return dict
    return list if origin in _SEQUENCES else None


def _convert_sequence(
    hint: object, options: tuple[object, ...], values: Sequence[object], path: str
) -> list[Any] | tuple[Any, ...]:
    is_tuple = (typing.get_origin(hint) or hint) is not list
    if (typing.get_origin(hint) or hint) is tuple and options and options[-1] is not Ellipsis:
        if len(values) != len(options):
            raise SettingsError(f"{path}: expected {len(options)} values, got {len(values)}")
        kinds: Sequence[Any] = options
    else:
        kinds = [options[0] if options else Any] * len(values)
    items = [
        _convert(k, v, join(path, i)) for i, (k, v) in enumerate(zip(kinds, values, strict=True))
    ]
    return tuple(items) if is_tuple else items


def _scalar_as(hint: object, value: object) -> Any:
    """The value as a scalar type, or _NONE. Text that is a number is taken for a float only."""
    if hint is type(None):
        return None if value is None else _NONE
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return _NONE
    if hint is int and isinstance(value, float) and value.is_integer():  # max_steps: 1e5
        return int(value)
    if hint is int and isinstance(value, bool):
        return _NONE
    if hint is Path and isinstance(value, str):
        return Path(value)
    return value if isinstance(hint, type) and isinstance(value, hint) else _NONE


def _describe(hint: object) -> str:
    """A type in words: `int or null`, `one of 'a', 'b'`."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(o) for o in options)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(o) for o in options)
    if hint is type(None):
        return "null"
    origin = typing.get_origin(hint) or hint
    if origin in _SEQUENCES:
        return "a list"
    if origin in _MAPPINGS or dataclasses.is_dataclass(hint):
        return "a mapping"
    return getattr(hint, "__name__", str(hint))
