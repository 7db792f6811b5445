# pyright: basic
"""JSON files beside weights: objects of bounded size."""

from pathlib import Path
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError
from speechlm2_jax.conversion.readers.kinds import check_file
from speechlm2_jax.settings import SettingsError, parse_json

MAX_BYTES = 1 << 26


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ConversionError if it is missing, damaged or no object."""
    check_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnsafeFileError(f"{path}: {path.stat().st_size} bytes of JSON are too many")
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    except SettingsError as error:
        raise ConversionError(f"{path} is {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return value
