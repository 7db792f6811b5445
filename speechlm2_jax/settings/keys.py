"""All keys of a block that cannot be used, so that a settings file is corrected in one go."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, cast

from speechlm2_jax.settings.build import by_target, check_first, field_of, has_keys, is_union
from speechlm2_jax.settings.errors import SettingsError, join


def key_problems(cls: type[Any], values: object, where: str = "") -> list[str]:
    """What `build` would say of each unknown or refused key, also of the blocks below.

    Values and missing keys are not looked at.
    """
    if not isinstance(values, Mapping):
        return []
    try:
        check_first(cls, cast(Mapping[str, Any], values), where)
    except SettingsError as error:
        return [str(error)]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    problems: list[str] = []
    for key, value in cast(Mapping[str, Any], values).items():
        path = join(where, key)
        try:
            name = field_of(cls, fields, key, value, path)
        except SettingsError as error:
            problems.append(str(error))
            continue
        if name is not None:
            problems += _below(hints[name], value, path)
    return problems


def raise_all(problems: Sequence[str]) -> None:
    """Raises one SettingsError for all problems; none for none."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        raise SettingsError(found[0])
    if found:
        raise SettingsError(f"{len(found)} keys cannot be used: {' | '.join(found)}")


def _below(hint: object, value: object, path: str) -> list[str]:
    """The problems of a value whose type has keys of its own."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return key_problems(cast(type[Any], hint), value, path)
    if is_union(hint):
        blocks = [option for option in options if has_keys(option, value)]
        try:
            fitting = by_target(blocks, value, path)
        except SettingsError as error:
            return [str(error)]
        return _below(fitting[0], value, path) if len(fitting) == 1 else []
    if origin in (list, tuple, Sequence) and isinstance(value, list | tuple) and options:
        items = enumerate(cast(Sequence[Any], value))
        return [p for i, item in items for p in _below(options[0], item, join(path, i))]
    return []
