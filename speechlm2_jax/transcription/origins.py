"""Which recording an output was made from, so that another one's is not taken for its own."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.transcription.inputs import GivenRecording

_SIGNED = re.compile(r"[?&](x-amz-signature|x-goog-signature|signature|sig|token)=", re.IGNORECASE)
"""What an address has that differs each time it is given out."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A recording as it was when it was transcribed."""

    place: str
    """Its absolute path or its address, and what tells it from others in that file."""
    size_bytes: int | None = None
    modified_ns: int | None = None
    """Of its file; None for an address, and for what has no file of its own."""

    def is_changed(self, now: "Origin") -> bool:
        """Whether its file is another than it is now."""
        return self.size_bytes is not None and self._file() != now._file()

    def is_other(self, now: "Origin") -> bool:
        """Whether `now` is another recording, and not this one, moved to another folder."""
        if self.place == now.place:
            return False
        is_kept = self.size_bytes is not None and self._file() == now._file()
        return not is_kept or os.path.exists(self.place)

    def to_dict(self) -> dict[str, Any]:
        """As the journal has it."""
        fields = {"place": self.place, "size": self.size_bytes, "modified_ns": self.modified_ns}
        return {key: value for key, value in fields.items() if value is not None}

    def _file(self) -> tuple[int | None, int | None]:
        return self.size_bytes, self.modified_ns


def origin_from(row: Mapping[str, Any]) -> Origin:
    """Of what `to_dict` gives. Raises KeyError."""
    return Origin(
        place=row["place"], size_bytes=row.get("size"), modified_ns=row.get("modified_ns")
    )


def origin_of(source: GivenRecording) -> Origin:
    """A recording as it is now."""
    holder = source.holder
    if is_remote(holder):
        place = holder.partition("?")[0] if _SIGNED.search(holder) else holder
        return Origin(place=place + source.inner)
    place = os.path.abspath(holder) + source.inner
    try:
        found = os.stat(holder)
    except (OSError, ValueError):  # reading it tells why
        return Origin(place=place)
    if not source.is_of_holder:
        return Origin(place=place)
    return Origin(place=place, size_bytes=found.st_size, modified_ns=found.st_mtime_ns)
