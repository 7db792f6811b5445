"""Looks `_target_` strings up in fixed tables. Nothing is ever imported by name."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from speechlm2_jax.settings.build import build
from speechlm2_jax.settings.errors import SettingsError
from speechlm2_jax.settings.keys import key_problems

T = TypeVar("T")


def select(table: Mapping[str, type[T]], values: Mapping[str, object], where: str) -> T:
    """Builds the class of `table` that the last component of `_target_` (or `name`) names.

    Raises SettingsError if it names none of them, with the choices, or if a key is invalid.
    """
    chosen, options = _chosen(table, values, where)
    return build(chosen, options, where)


def selected_problems(table: Mapping[str, type[object]], values: object, where: str) -> list[str]:
    """The error messages of `select` for the target and each key; none if `values` is no block."""
    if not isinstance(values, Mapping) or not values:
        return []
    try:
        chosen, options = _chosen(table, cast(Mapping[str, object], values), where)
    except SettingsError as error:
        return [str(error)]
    return key_problems(chosen, options, where)


def _chosen(
    table: Mapping[str, type[T]], values: Mapping[str, object], where: str
) -> tuple[type[T], dict[str, Any]]:
    """The class that `_target_` or `name` names, and the other keys."""
    target = values.get("_target_", values.get("name"))
    chosen = table.get(str(target).rpartition(".")[2])
    if chosen is None:
        choices = ", ".join(sorted(table))
        raise SettingsError(f"{where}._target_: unsupported {target!r}; choose one of {choices}")
    return chosen, {k: v for k, v in values.items() if k not in ("_target_", "name")}
