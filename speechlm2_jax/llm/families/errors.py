"""What is wrong with a config.json, and values as text."""

import math

MAX_SHOWN = 80


class ConfigError(ValueError):
    """A config.json that cannot be honoured, in words for the user."""


def shown(value: object) -> str:
    """Returns a value as text, not longer than a line of a terminal."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def finite(key: str, value: object, *, may_be_zero: bool = True) -> float:
    """Returns a finite number that is not negative. Raises ConfigError for another value."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        number = math.inf
    is_sound = math.isfinite(number) and (number > 0 or (may_be_zero and number == 0))
    if isinstance(value, bool) or not is_sound:
        bound = "" if may_be_zero else " above 0"
        raise ConfigError(f"{key}={shown(value)} should be a finite number{bound}")
    return number
