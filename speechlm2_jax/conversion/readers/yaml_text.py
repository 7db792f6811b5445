# pyright: basic
"""YAML from inside a checkpoint: plain data, of bounded size, with bounded aliases."""

from typing import Any

import yaml

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What PyYAML raises for an integer of 10,000 digits, or a value that its tag does not fit."""


def read_yaml(text: bytes, where: str) -> dict[str, Any]:
    """Reads a mapping of plain values.

    Raises UnsafeFileError for Python objects, for more than 1 MiB, and for aliases that expand
    to more than 100,000 nodes; ConversionError for anything that is no mapping.
    """
    if len(text) > MAX_BYTES:
        raise UnsafeFileError(f"{where}: {len(text)} bytes of YAML; {MAX_BYTES} are allowed")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _expanded(root, {}, where)
        value = yaml.load(text, Loader=yaml.SafeLoader)
    except yaml.constructor.ConstructorError as error:
        raise UnsafeFileError(f"{where}: {error.problem}; only plain values are read") from error
    except (yaml.YAMLError, RecursionError, *UNREADABLE) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{where}: not readable as YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{where}: a mapping of settings is expected")
    return value


def _expanded(node: Any, known: dict[int, int], where: str) -> int:
    """Counts the nodes below `node` as if every alias were written out."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise UnsafeFileError(f"{where}: an alias contains itself")
        return known[id(node)]
    known[id(node)] = 0
    children: list[Any] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    count = 1 + sum(_expanded(child, known, where) for child in children)
    if count > MAX_NODES:
        raise UnsafeFileError(f"{where}: its aliases expand to more than {MAX_NODES} values")
    known[id(node)] = count
    return count
