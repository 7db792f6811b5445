# pyright: basic
"""YAML from inside a checkpoint: plain data, of bounded size, with bounded aliases."""

from typing import Any

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError, refusals
from speechlm2_jax.settings import decode_text, parse_yaml

MAX_BYTES = 1 << 20
MAX_NODES = 100_000


def read_yaml(text: bytes, where: str) -> dict[str, Any]:
    """Reads a mapping of plain values.

    Raises UnsafeFileError for Python objects, for more than 1 MiB, and for aliases that expand
    to more than 100,000 values; ConversionError for anything that is no mapping.
    """
    if len(text) > MAX_BYTES:
        raise UnsafeFileError(f"{where}: {len(text)} bytes of YAML; {MAX_BYTES} are allowed")
    with refusals(where):
        value = parse_yaml(decode_text(text), most=MAX_NODES, any_key=True)
    if not isinstance(value, dict):
        raise ConversionError(f"{where}: a mapping of settings is expected")
    return value
