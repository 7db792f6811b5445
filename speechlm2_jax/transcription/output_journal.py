"""Which files `speechlm2-jax transcribe` wrote: a hidden list in each folder of outputs.

A text beside a recording may be a reference that a person wrote. It is neither taken for a
transcript nor replaced: only what the list has is the command's own.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

Entry = tuple[Path, str]
"""A folder, and the name of a file in it, or the key of a row of its transcripts.jsonl."""
JOURNAL = ".speechlm2-transcripts"
"""The file in each folder: JSON lines, of which the last about a name holds."""
WRITTEN, AGAIN = "written", "again"
"""States: whole and final; of this command, but to be written (again)."""


class OutputJournal:
    """The states of outputs, read when they are asked for."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, str]] = {}

    def state(self, entry: Entry) -> str | None:
        """WRITTEN, AGAIN, or None for what the command did not write."""
        folder, name = entry
        if folder not in self._folders:
            self._folders[folder] = _read(folder / JOURNAL)
        return self._folders[folder].get(name)

    def note(self, entries: Iterable[Entry], state: str) -> None:
        """Writes the state of some outputs. Raises OSError."""
        changed: dict[Path, list[str]] = defaultdict(list)
        for folder, name in entries:
            if self.state((folder, name)) != state:
                changed[folder].append(name)
        for folder, names in changed.items():
            lines = [json.dumps({"name": name, "state": state}) for name in names]
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / JOURNAL).open("a", encoding="utf-8") as file:
                # the line break comes first, so that a line cut off by a crash spoils no other
                file.write("".join(f"\n{line}" for line in lines))
            self._folders[folder].update(dict.fromkeys(names, state))


def _read(file: Path) -> dict[str, str]:
    states: dict[str, str] = {}
    for line in file.read_text("utf-8").split("\n") if file.is_file() else ():
        try:
            row = json.loads(line)
            states[row["name"]] = row["state"]
        except (ValueError, KeyError, TypeError):  # cut off
            continue
    return states
