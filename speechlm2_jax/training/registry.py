"""`_target_` strings choose from closed tables; nothing is ever imported by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

from speechlm2_jax.settings import SettingsError, build, key_problems

T = TypeVar("T")


def select(table: Mapping[str, type[T]], values: Mapping[str, Any], where: str) -> T:
    """Builds the class of `table` that the last component of `_target_` (or `name`) names.

    Raises SettingsError with the choices if it names none of them, or if a key does not fit.
    """
    chosen, options = _chosen(table, values, where)
    return build(chosen, options, where)


def selected_problems(table: Mapping[str, type[Any]], values: Any, where: str) -> list[str]:
    """What `select` would say of the target and of each key; nothing of what is no block."""
    if not isinstance(values, Mapping) or not values:
        return []
    try:
        chosen, options = _chosen(table, values, where)
    except SettingsError as error:
        return [str(error)]
    return key_problems(chosen, options, where)


def _chosen(
    table: Mapping[str, type[T]], values: Mapping[str, Any], where: str
) -> tuple[type[T], dict[str, Any]]:
    """The class that is asked for, and the other keys."""
    target = values.get("_target_", values.get("name"))
    chosen = table.get(str(target).rpartition(".")[2])
    if chosen is None:
        choices = ", ".join(sorted(table))
        raise SettingsError(f"{where}._target_: unsupported {target!r}; choose one of {choices}")
    return chosen, {k: v for k, v in values.items() if k not in ("_target_", "name")}
