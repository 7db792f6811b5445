"""Text that a user's files hold: UTF-8 with or without a byte order mark."""

import codecs
from pathlib import Path

from speechlm2_jax.settings.errors import SettingsError

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is a part of it
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_text(data: bytes) -> str:
    """Decodes UTF-8; a byte order mark at the start is left out.

    Raises SettingsError for any other encoding, naming it where its own byte order mark does.
    """
    for mark, name in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise SettingsError(f"{name} text (by its byte order mark); save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise SettingsError(
            f"not UTF-8 text (byte 0x{byte:02x} at position {error.start}); save it as UTF-8"
        ) from None


def read_text(path: str | Path) -> str:
    """Reads a text file, as `decode_text` does. Raises SettingsError, naming the file."""
    try:
        return decode_text(Path(path).read_bytes())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from None
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
