"""`_target_` strings choose from closed tables; nothing is ever imported by name."""

from collections.abc import Mapping
from typing import Any, TypeVar

from speechlm2_jax.settings import SettingsError, build

T = TypeVar("T")


def select(table: Mapping[str, type[T]], values: Mapping[str, Any], where: str) -> T:
    """Builds the class of `table` that the last component of `_target_` (or `name`) says.

    Raises SettingsError naming the choices if it says none of them, or if a key does not fit.
    """
    target = values.get("_target_", values.get("name"))
    chosen = table.get(str(target).rpartition(".")[2])
    if chosen is None:
        choices = ", ".join(sorted(table))
        raise SettingsError(f"{where}._target_: unsupported {target!r}; choose one of {choices}")
    options = {k: v for k, v in values.items() if k not in ("_target_", "name")}
    return build(chosen, options, where)
