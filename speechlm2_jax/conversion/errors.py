"""The ways in which a foreign file is turned down."""

import difflib
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from speechlm2_jax.settings import HostileTextError, SettingsError

SHOWN = 5


class ConversionError(ValueError):
    """The weights or the config do not fit; the message names the tensors or keys."""


class MissingWeightsError(ConversionError):
    """A folder that may be right, but has no weights yet."""


class SelfTestError(ConversionError):
    """A written model computes something else than its source."""


class UnsafeFileError(ConversionError):
    """The file asks for something that weights never need; nothing of it was carried out."""


@contextmanager
def refusals(where: str = "") -> Generator[None]:
    """Raises what the readers of JSON and YAML refuse as a ConversionError that names `where`."""
    try:
        yield
    except SettingsError as error:
        kind = UnsafeFileError if isinstance(error, HostileTextError) else ConversionError
        raise kind(f"{where}: {error}" if where else str(error)) from error


def listed(names: Iterable[str], nearest_in: Iterable[str] = ()) -> str:
    """Lists the first few, each with its nearest candidate, and counts the rest."""
    names, candidates = sorted(names), list(nearest_in)
    shown: list[str] = []
    for name in names[:SHOWN]:
        close = difflib.get_close_matches(name, candidates, n=1)
        shown.append(f"{name} (nearest: {close[0]})" if close else name)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more
