# pyright: basic
"""JSON files beside weights: objects of bounded size."""

import json
from pathlib import Path
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError

MAX_BYTES = 1 << 26


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ConversionError if it is missing, damaged or no object."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnsafeFileError(f"{path}: {path.stat().st_size} bytes of JSON are too many")
        value = json.loads(path.read_bytes())
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: an object is expected")
    return value
