"""Which files `speechlm2-jax transcribe` wrote: a hidden list in each folder of outputs.

A text beside a recording may be a reference that a person wrote. It is neither taken for a
transcript nor replaced: only what the list has is the command's own. The list also has the
recording of each output, as it was then.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.transcription.lines_file import key_of
from speechlm2_jax.transcription.origins import Origin, origin_from

Entry = tuple[Path, str]
"""A folder, and the name of a file in it, or the key of a row of its transcripts.jsonl."""
JOURNAL = ".speechlm2-transcripts"
"""The file in each folder: JSON lines, of which the last about a name holds."""
WRITTEN, AGAIN = "written", "again"
"""States: whole and final; of this command, but to be written (again)."""


@dataclass(frozen=True)
class _Noted:
    state: str
    origin: Origin | None = None

    def line(self, name: str) -> str:
        origin = {} if self.origin is None else {"source": self.origin.to_dict()}
        return json.dumps({"name": name, "state": self.state} | origin)


class OutputJournal:
    """The states of outputs, read when they are asked for."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, _Noted]] = {}

    def state(self, entry: Entry) -> str | None:
        """WRITTEN, AGAIN, or None for what the command did not write."""
        noted = self._noted(entry)
        return None if noted is None else noted.state

    def origin(self, entry: Entry) -> Origin | None:
        """The recording of an output; None if the list has none, as earlier ones had not."""
        noted = self._noted(entry)
        return None if noted is None else noted.origin

    def note(self, origins: Mapping[Entry, Origin | None], state: str) -> None:
        """Writes the state of some outputs, and their recordings. Raises OSError."""
        changed: dict[Path, dict[str, _Noted]] = defaultdict(dict)
        for entry, origin in origins.items():
            if self._noted(entry) != (noted := _Noted(state, origin)):
                changed[entry[0]][entry[1]] = noted
        for folder, of_names in changed.items():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / JOURNAL).open("a", encoding="utf-8") as file:
                # the line break comes first, so that a line cut off by a crash spoils no other
                file.write("".join(f"\n{noted.line(name)}" for name, noted in of_names.items()))
            self._folders[folder].update(of_names)

    def _noted(self, entry: Entry) -> _Noted | None:
        folder, name = entry
        if folder not in self._folders:
            self._folders[folder] = _read(folder / JOURNAL)
        return self._folders[folder].get(name)


def _read(file: Path) -> dict[str, _Noted]:
    states: dict[str, _Noted] = {}
    for line in file.read_text("utf-8").split("\n") if os.path.isfile(file) else ():
        try:
            row = json.loads(line)
            origin = origin_from(row["source"]) if "source" in row else None
            states[_name(row, file.parent)] = _Noted(row["state"], origin)
        except (ValueError, KeyError, TypeError, AttributeError):  # cut off
            continue
    return states


def _name(row: Mapping[str, Any], folder: Path) -> str:
    """The name in a line; the rows of transcripts.jsonl once had relative paths as theirs."""
    name = row["name"]
    return key_of(json.loads(name), folder) if name.startswith("{") else name
