# pyright: basic
"""JSON files beside weights."""

from pathlib import Path
from typing import Any

from speechlm2_jax import settings
from speechlm2_jax.conversion.errors import refusals
from speechlm2_jax.conversion.readers.kinds import check_file


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ConversionError if it is missing, damaged or no object."""
    check_file(path)
    with refusals():
        return settings.read_json(path)
