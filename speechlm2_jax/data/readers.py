"""Manifests as conversations: NeMo's lines, lines of turns, and Lhotse cuts.

Ids, texts and durations are read here. As in NeMo, the header of a recording is read for its
length unless the manifest gives a sampling rate; samples are never read here.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from speechlm2_jax.data.conversations import AudioClip, AudioTurn, Conversation, TextTurn
from speechlm2_jax.data.cuts import clip_of_cut, conversation_of_cut, read_cuts
from speechlm2_jax.data.headers import file_durations_s
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_options import ManifestOptions, conversation_of_recording
from speechlm2_jax.data.manifest_values import (
    check_text_key,
    located,
    mapping,
    missing_key,
    near_miss,
    seconds,
    shown,
    text,
)
from speechlm2_jax.data.paths import Finder, local_file
from speechlm2_jax.settings import SettingsError

ROWS_AT_ONCE = 512
"""Rows whose audio headers are read in parallel."""
_CUT_KEYS = ("type", "recording", "supervisions", "features", "tracks", "start")


def read_manifest(path: str | Path, options: ManifestOptions) -> Iterator[Conversation]:
    """Reads a manifest whose first line tells what it is.

    A line with `audio_filepath` is NeMo's, one with `conversations` holds turns, any other is a
    Lhotse cut. Raises SettingsError for a missing file and for a line that cannot be read, naming
    it.
    """
    path = local_file(path)
    first = next(json_lines(path), None)
    if first is None:
        raise SettingsError(f"{path}: the manifest is empty")
    where, row = first
    if "conversations" in row:
        yield from _read(path, options, _DialogRow)
    elif "audio_filepath" in row:
        yield from _read(path, options, _NemoRow)
    elif any(key in row for key in _CUT_KEYS):
        for where, cut in read_cuts(path):
            with located(where):
                clip = clip_of_cut(cut, options.channel)
                conversation = conversation_of_cut(cut, clip, options, where=where)
            yield conversation
    else:
        is_dialog = near_miss(row, "audio_filepath") is None and near_miss(row, "conversations")
        key = "conversations" if is_dialog else "audio_filepath"
        raise SettingsError(
            f"{where}: neither a NeMo manifest nor conversations nor Lhotse cuts: "
            f"{missing_key(row, key)}"
        )


class _NemoRow:
    """A line of a NeMo manifest: one recording and its transcript."""

    def __init__(self, row: dict[str, Any], finder: Finder) -> None:
        if not isinstance(row.get("audio_filepath"), str):
            raise SettingsError(
                missing_key(row, "audio_filepath")
                if row.get("audio_filepath") is None
                else f"audio_filepath must be text, got {shown(row['audio_filepath'])}"
            )
        self.audio = row.pop("audio_filepath")
        self.path = finder(self.audio)
        self.declared_s = _optional_seconds(row, "duration")
        self.offset_s = _optional_seconds(row, "offset")
        rate = row.pop("sampling_rate", None)
        is_measured = (rate if rate is not None else row.pop("sample_rate", None)) is not None
        if is_measured and self.declared_s is None:
            raise SettingsError(missing_key(row, "duration"))
        self.unmeasured_files = () if is_measured else (self.path,)
        self.own = row

    def conversation(
        self, lengths: Mapping[str, float | None], options: ManifestOptions, where: str
    ) -> Conversation:
        """The recording and its text, once the lengths of `unmeasured_files` are known."""
        length_s = lengths[self.path] if self.unmeasured_files else None
        if length_s is None and self.declared_s is None and near_miss(self.own, "duration"):
            raise SettingsError(missing_key(self.own, "duration"))
        duration_s = (
            _stretch_s(self.declared_s, self.offset_s, length_s)
            if self.offset_s is not None or length_s is None
            else length_s
        )
        stem = Path(self.audio).stem
        named_s = duration_s if self.declared_s is None else self.declared_s
        clip = AudioClip(
            id=stem if self.offset_s is None else _stretch_id(stem, self.offset_s, named_s),
            path=self.path,
            offset_s=self.offset_s or 0.0,
            duration_s=duration_s,
            channel=options.channel,
            is_segment=self.offset_s is not None,
        )
        check_text_key(self.own, options.text_field)
        response, name = self.own.get(options.text_field), str(self.own.get("id") or clip.id)
        return conversation_of_recording(name, clip, response, self.own, options, where=where)


class _DialogRow:
    """A line of a conversation: text and recordings, turn by turn."""

    def __init__(self, row: dict[str, Any], finder: Finder) -> None:
        self.fields = mapping(row.get("custom"), "custom")
        self.is_skipped = bool(self.fields.get("_skipme"))
        turns = [] if self.is_skipped else row.get("conversations")
        if turns is None:
            raise SettingsError(missing_key(row, "conversations"))
        if not isinstance(turns, list) or not (turns or self.is_skipped):
            raise SettingsError(f"conversations must be a list of turns, got {shown(turns)}")
        self.turns = [_Turn(turn, number, finder) for number, turn in enumerate(turns, start=1)]
        self.unmeasured_files = tuple(turn.path for turn in self.turns if turn.path is not None)
        self.id = row.get("id")

    def conversation(
        self, lengths: Mapping[str, float | None], options: ManifestOptions, where: str
    ) -> Conversation | None:
        """The turns, after those that tags add; None for a line to be skipped."""
        if self.is_skipped:
            return None
        turns = [turn.turn(lengths, options) for turn in self.turns]
        first, tags = turns[0], options.tags or {}
        if (
            isinstance(first, AudioTurn)
            and first.role == "user"
            and tags.get("context") is not None
        ):
            turns.insert(0, TextTurn(role="user", text=text(tags["context"], "context")))
        if first.role != "system" and tags.get("system_prompt") is not None:
            prompt = text(tags["system_prompt"], "system_prompt")
            turns.insert(0, TextTurn(role="system", text=prompt))
        return Conversation(
            id=where if self.id is None else str(self.id),
            turns=tuple(turns),
            token_equivalent_duration_s=options.token_equivalent_duration_s,
            fields=options.all_fields(self.fields),
            where=where,
        )


class _Turn:
    """One turn of a line."""

    def __init__(self, turn: object, number: int, finder: Finder) -> None:
        with located(f"not a conversation: turn {number}"):
            if not isinstance(turn, dict):
                raise SettingsError(f"expected an object with from and value, got {shown(turn)}")
            role, kind = turn.get("from"), turn.get("type", "text")
            if not isinstance(role, str):
                raise SettingsError(f"from must be a role, got {shown(role)}")
            if kind not in ("text", "audio"):
                raise SettingsError(f"type must be text or audio, got {shown(kind)}")
            self.role = role.lower()
            self.value = text(turn.get("value"), "value")
            self.path = finder(self.value) if kind == "audio" else None
            self.offset_s = _optional_seconds(turn, "offset") or 0.0
            self.declared_s = _optional_seconds(turn, "duration")

    def turn(
        self, lengths: Mapping[str, float | None], options: ManifestOptions
    ) -> TextTurn | AudioTurn:
        """The turn; of a recording never more than its file has."""
        if self.path is None:
            return TextTurn(role=self.role, text=self.value)
        duration_s = _stretch_s(self.declared_s, self.offset_s, lengths[self.path])
        ends = f"_{self.offset_s:.3f}_{duration_s:.3f}" if self.offset_s > 0 else ""
        clip = AudioClip(
            id=Path(self.value).stem + ends,
            path=self.path,
            offset_s=self.offset_s,
            duration_s=duration_s,
            channel=options.channel,
        )
        return AudioTurn(role=self.role, clip=clip, locator_tag=options.locator_tag)


def _read(
    path: Path, options: ManifestOptions, kind: type[_NemoRow] | type[_DialogRow]
) -> Iterator[Conversation]:
    """The conversations of a manifest of one kind of row, its headers read many at a time."""
    finder, lines = Finder(path), json_lines(path)
    while chunk := list(islice(lines, ROWS_AT_ONCE)):
        rows: list[tuple[str, _NemoRow | _DialogRow]] = []
        for where, row in chunk:
            if not row.pop("_skipme", False):
                with located(where):
                    rows.append((where, kind(row, finder)))
        lengths = file_durations_s(name for _, row in rows for name in row.unmeasured_files)
        for where, row in rows:
            with located(where):
                conversation = row.conversation(lengths, options, where)
            if conversation is not None:
                yield conversation


def _stretch_s(declared_s: float | None, offset_s: float | None, length_s: float | None) -> float:
    """Seconds of a stretch: as declared, but no more than the file has from its offset on.

    0 of a file that cannot be opened and of which nothing is declared, which loading will report;
    a stretch behind the file's end keeps its declared length, for the same end.
    """
    rest_s = None if length_s is None else length_s - (offset_s or 0.0)
    if declared_s is None:
        return max(rest_s or 0.0, 0.0)
    return declared_s if rest_s is None or rest_s <= 0 else min(declared_s, rest_s)


def _stretch_id(stem: str, offset_s: float, duration_s: float) -> str:
    return f"{stem}-{_hundredths(offset_s)}-{_hundredths(duration_s)}"


def _optional_seconds(row: dict[str, object], key: str) -> float | None:
    value = row.pop(key, None)
    return None if value is None else seconds(value, key)


def _hundredths(duration_s: float) -> str:
    return f"{round(duration_s * 1e2):06d}"
