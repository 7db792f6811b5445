"""The one reader of JSON: bounded in size and depth, and what it refuses is one line."""

import json
from pathlib import Path
from typing import Any, cast

from speechlm2_jax.settings.errors import HostileTextError, SettingsError

MAX_JSON_BYTES = 1 << 26


def parse_json(content: bytes | str) -> Any:
    """Reads JSON; bytes may begin with a byte order mark.

    Raises SettingsError for what is no JSON, nests too deeply, or has a number of thousands of
    digits.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise SettingsError("not JSON that can be read: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise SettingsError(f"not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"not JSON: not text ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        # Python refuses to convert integers of more than 4,300 digits
        raise SettingsError(f"not JSON that can be read: a number is too long ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises SettingsError, naming the file, if it cannot be read, is larger than 64 MiB
    (HostileTextError), or holds anything else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise HostileTextError(f"{path}: {size} bytes of JSON are too many")
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    except HostileTextError:
        raise
    except SettingsError as error:
        raise SettingsError(f"{path} is {error}") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{path} must hold a JSON object")
    return cast(dict[str, Any], value)
