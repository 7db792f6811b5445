"""The one reader of JSON files: bounded, and what it refuses is one line."""

import json
from typing import Any

from speechlm2_jax.settings.errors import SettingsError


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
