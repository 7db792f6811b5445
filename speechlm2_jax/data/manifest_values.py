"""Checks of the values in a manifest's rows, with one-line errors."""

import difflib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.settings import SettingsError

MAX_SECONDS = 1e7
"""115 days: no recording is longer."""
MAX_CHANNELS = 65_535
"""No header can tell of more."""
_SHOWN = 60
"""Characters of a wrong value that an error shows."""
_WRONG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_NEAR_MISSES = {
    "audio_filepath": (
        *("audio_filename", "audio_file", "audio_path", "audio", "audiofile", "audio_file_path"),
        *("wav_filepath", "wav_filename", "wav_path", "wav_file", "wav", "sound", "recording_path"),
        *("file_path", "filepath", "file_name", "filename", "file", "path", "source"),
    ),
    "duration": ("dur", "length", "seconds", "duration_s", "duration_sec", "duration_seconds"),
    "text": (
        *("transcript", "transcription", "transcripts", "transcriptions", "sentence", "sentences"),
        *("txt", "texts", "normalized_text", "text_normalized", "raw_text", "utterance_text"),
    ),
    "conversations": ("conversation", "messages", "dialog", "dialogue", "turns"),
}


class _Located:
    """What `located` gives; a generator takes three times as long, for each of millions of rows."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, StorageError):
            raise StorageError(f"{self._where}: {error}", cause=error.cause) from error
        if isinstance(error, SettingsError):
            raise SettingsError(f"{self._where}: {error}") from error
        if isinstance(error, _WRONG):
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SettingsError(f"{self._where}: cannot be read ({reason[:200]})") from error


def located(where: str) -> AbstractContextManager[None]:
    """Raises SettingsError, naming `where`, for whatever a wrong value makes the block raise.

    A StorageError stays one, with its cause.
    """
    return _Located(where)


def seconds(value: object, key: str) -> float:
    """A time or duration. Raises SettingsError for anything else, infinite and absurd ones too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"{key} must be seconds, got {shown(value)}")
    if not 0 <= value < MAX_SECONDS:  # NaN is not either
        raise SettingsError(
            f"{key} must be seconds, from 0 to less than {MAX_SECONDS:.0e}, got {shown(value)}"
        )
    return float(value)


def moment(value: object, key: str) -> float:
    """A time that may lie before the start. Raises SettingsError for what is none."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) < MAX_SECONDS
    ):
        raise SettingsError(f"{key} must be seconds, got {shown(value)}")
    return float(value)


def text(value: object, key: str) -> str:
    """Text; a number is taken as it is written. Raises SettingsError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"{key} must be text, got {shown(value)}")
    return str(value)


def named_file(value: str, key: str) -> str:
    """The name of a file. Raises SettingsError for one that no file can have."""
    if not value or "\0" in value:
        raise SettingsError(f"{key} must name a file, got {shown(value)}")
    return value


def check_channel(value: object) -> None:
    """Raises SettingsError for a number that is no channel; a word may describe a recording."""
    is_channel = isinstance(value, int) and 0 <= value < MAX_CHANNELS
    if isinstance(value, int | float) and not is_channel:
        raise SettingsError(f"channel must be a number from 0, of a channel, got {shown(value)}")


def mapping(value: object, key: str) -> Mapping[str, Any]:
    """A JSON object; null is an empty one. Raises SettingsError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SettingsError(f"{key} must be an object of fields, got {shown(value)}")
    return value


def near_miss(row: Mapping[str, object], wanted: str) -> str | None:
    """A key of a row that was probably meant to be `wanted`."""
    named, spelt = _other_name(row, wanted), {_plain(key): key for key in row}
    close = difflib.get_close_matches(wanted, list(spelt), n=1, cutoff=0.75)
    return named if named is not None or not close else spelt[close[0]]


def check_text_key(row: Mapping[str, object], wanted: str) -> None:
    """Raises SettingsError if a row has its text under another name of the key `wanted`.

    Only well-known names count, none that is merely alike: a row without text may be meant so.
    """
    near = None if wanted in row else _other_name(row, wanted)
    if near is not None:
        raise SettingsError(
            f"{wanted} is missing; rename {near!r} to {wanted!r}, or set text_field: {near}"
        )


def _other_name(row: Mapping[str, object], wanted: str) -> str | None:
    """A key of a row that is `wanted` in other letters, or a well-known name for it."""
    spelt = {_plain(key): key for key in row}
    names = (_plain(wanted), *_NEAR_MISSES.get(wanted, ()))
    return next((spelt[name] for name in names if name in spelt), None)


def _plain(key: str) -> str:
    return key.strip().casefold().replace("-", "_").replace(" ", "_")


def missing_key(row: Mapping[str, object], wanted: str) -> str:
    """The message for a missing key, with the key that was probably meant."""
    if wanted in row:
        return f"{wanted} is {shown(row[wanted])}; it must have a value"
    near = near_miss(row, wanted)
    if near is not None:
        return f"{wanted} is missing; rename {near!r} to {wanted!r}"
    return f"{wanted} is missing; the keys are {shown(', '.join(map(str, row)))}"


def shown(value: object) -> str:
    """A value as an error shows it: short."""
    if value is None:
        return "null"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_SHOWN:
        return "an integer of more than 60 digits"
    text_ = ascii(value)
    return text_ if len(text_) <= _SHOWN else f"{text_[:_SHOWN]}..."
