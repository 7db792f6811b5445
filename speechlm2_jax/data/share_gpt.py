"""Dialogs in ShareGPT's form, in which a placeholder in a text stands for the row's recording."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import AudioTurn, Conversation, TextTurn
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import (
    DialogFormat,
    Find,
    Lengths,
    ManifestRow,
    clip_of_turn,
    conversations_of_rows,
    optional_seconds,
    stretch_s,
)
from speechlm2_jax.data.manifest_values import located, missing_key, shown, text
from speechlm2_jax.data.paths import Finder, local_file
from speechlm2_jax.settings import SettingsError

PLACEHOLDERS = ("<sound>", "<speech>")
"""What stands for a recording where the settings name nothing, as in NeMo."""
_USERS = ("human", "user")
_OWN_KEYS = ("id", "conversations", "sound", "ori_sound")


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A text of a turn, or the stretch of the recording that a placeholder stands for."""

    role: str
    text: str | None
    offset_s: float = 0.0
    declared_s: float | None = None


class ShareGptRow:
    """A row: turns of text, with a placeholder for the recording that `sound` names.

    Args:
        row: its fields.
        find: where the recording is.
        placeholders: what stands for it.
        name: of the recording, where the row names none.
    """

    def __init__(
        self,
        row: dict[str, Any],
        find: Find,
        placeholders: Sequence[str] = PLACEHOLDERS,
        name: str | None = None,
    ) -> None:
        turns = row.get("conversations")
        if turns is None:
            raise SettingsError(missing_key(row, "conversations"))
        if not isinstance(turns, list) or not turns:
            raise SettingsError(f"conversations must be a list of turns, got {shown(turns)}")
        self.pieces = [
            piece
            for number, turn in enumerate(turns, start=1)
            for piece in _pieces(turn, number, placeholders)
        ]
        self.name = audio_of(row) or name
        self.unmeasured_files = tuple(
            find(self._required_name()) for piece in self.pieces if piece.text is None
        )
        self.id = row.get("id")
        self.fields = {key: value for key, value in row.items() if key not in _OWN_KEYS}

    def conversation(self, lengths: Lengths, options: ManifestOptions, where: str) -> Conversation:
        """The turns: texts, and the recording in place of each placeholder."""
        locations = iter(self.unmeasured_files)
        turns = (
            TextTurn(role=piece.role, text=piece.text)
            if piece.text is not None
            else self._recording(piece, next(locations), lengths, options)
            for piece in self.pieces
        )
        return Conversation(
            id=where if self.id is None else str(self.id),
            turns=tuple(turns),
            token_equivalent_duration_s=options.token_equivalent_duration_s,
            fields=options.all_fields(self.fields),
            where=where,
        )

    def _recording(
        self, piece: _Piece, location: AudioLocation, lengths: Lengths, options: ManifestOptions
    ) -> AudioTurn:
        duration_s = stretch_s(piece.declared_s, piece.offset_s, lengths[location])
        name = self._required_name()
        clip = clip_of_turn(name, location, piece.offset_s, duration_s, options)
        return AudioTurn(role=piece.role, clip=clip, locator_tag=options.locator_tag)

    def _required_name(self) -> str:
        if self.name is None:
            raise SettingsError("a placeholder of a recording, but none is named: give `sound`")
        return self.name


def audio_of(row: Mapping[str, Any]) -> str | None:
    """The recording that a row names, if any. Raises SettingsError for a name that is no text."""
    name = row.get("sound") or row.get("ori_sound")
    if name is not None and not isinstance(name, str):
        raise SettingsError(f"sound must be a path, got {shown(name)}")
    return name or None


def share_gpt(placeholders: Sequence[str]) -> DialogFormat:
    """The form with these placeholders, for recordings in a tar: one member for each of them."""

    def names(row: Mapping[str, Any]) -> list[str]:
        turns, name = row.get("conversations"), row.get("sound") or row.get("ori_sound")
        texts = [
            turn["value"]
            for turn in (turns if isinstance(turns, list) else ())
            if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        ]
        has = [one for one in texts if any(placeholder in one for placeholder in placeholders)]
        return [name] * len(has) if isinstance(name, str) and name else []

    return DialogFormat(row=lambda row, find: ShareGptRow(row, find, placeholders), names=names)


def _pieces(turn: object, number: int, placeholders: Sequence[str]) -> Iterator[_Piece]:
    """The texts and the recording of a turn, in order."""
    with located(f"turn {number}"):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise SettingsError(f"expected an object with from and value, got {shown(turn)}")
        value = text(turn.get("value"), "value")
        role = _role(turn["from"])
        count = sum(value.count(placeholder) for placeholder in placeholders)
        if count > 1:
            raise SettingsError(f"{count} placeholders, but a turn has one recording; keep one")
        if not count:
            yield _Piece(role=role, text=value)
            return
        found = next(placeholder for placeholder in placeholders if placeholder in value)
        before, _, after = value.partition(found)
        stretch = {
            "offset_s": optional_seconds(turn, "offset") or 0.0,
            "declared_s": optional_seconds(turn, "duration"),
        }
    if before.strip():
        yield _Piece(role=role, text=before.strip())
    yield _Piece(role=role, text=None, **stretch)
    if after.strip():
        yield _Piece(role=role, text=after.strip())


def _role(name: str) -> str:
    """`human` is the user and `gpt` the assistant, as any other name but `system` is."""
    plain = name.lower()
    return "user" if plain in _USERS else "system" if plain == "system" else "assistant"


def read_share_gpt(
    path: str | Path,
    options: ManifestOptions,
    *,
    placeholders: Sequence[str] = PLACEHOLDERS,
    audio_root: str | None = None,
) -> Iterator[Conversation]:
    """Reads a file of rows.

    Args:
        path: one JSON object per line.
        options: how rows become conversations.
        placeholders: what stands for a recording in a text.
        audio_root: the folder of relative paths; None: that of the file.

    Raises SettingsError for a missing file or folder, and for a wrong row, naming its line.
    """
    path = local_file(path)
    finder = finder_of(path, audio_root)
    find = partial(_found, finder)
    rows = _rows(path, find, placeholders)
    yield from conversations_of_rows(rows, options)


def _found(finder: Finder, name: str) -> AudioLocation:
    return AudioLocation(finder(name), storage=finder.storage)


def finder_of(path: Path, audio_root: str | None) -> Finder:
    """Finds the recordings that a file names, in a folder or beside it."""
    return Finder(path) if audio_root is None else Finder.of_folder(audio_root)


def _rows(
    path: Path, find: Find, placeholders: Sequence[str]
) -> Iterator[tuple[str, Callable[[], ManifestRow]]]:
    for where, row in json_lines(path):
        yield where, partial(ShareGptRow, row, find, placeholders)
