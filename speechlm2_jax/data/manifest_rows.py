"""Rows of NeMo's manifests: a recording with its text, or a dialog turn by turn."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

from speechlm2_jax.data.audio import LOSSY_TOLERANCE_S, LOSSY_TOLERANCE_SHARE
from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import AudioClip, AudioTurn, Conversation, TextTurn
from speechlm2_jax.data.headers import FoundSeconds, file_durations_s
from speechlm2_jax.data.manifest_options import ManifestOptions, conversation_of_recording
from speechlm2_jax.data.manifest_values import (
    check_channel,
    check_text_key,
    located,
    mapping,
    missing_key,
    named_file,
    near_miss,
    seconds,
    shown,
    text,
)
from speechlm2_jax.data.paths import stem as path_stem
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.settings import SettingsError

ROWS_AT_ONCE = 512
"""Rows whose audio headers are read in parallel."""
WHOLE_MEMBER_S = 0.2
"""A member of a tar that is declared this exactly is taken whole, as in NeMo."""

Find = Callable[[str], AudioLocation]
"""Where the recording is that a row names. Raises SettingsError if it cannot be anywhere."""
Lengths = Mapping[AudioLocation, float | None]
"""Seconds of recordings by their headers; None of one that cannot be opened."""


class ManifestRow(Protocol):
    """A row of a manifest, as it is before the lengths of its recordings are known."""

    unmeasured_files: tuple[AudioLocation, ...]
    """The recordings whose headers must be read."""

    def conversation(
        self, lengths: Lengths, options: ManifestOptions, where: str
    ) -> Conversation | None:
        """The conversation, once they are; None for a row to be skipped."""
        ...


NamedRow = tuple[str, Callable[[], ManifestRow]]
"""The words that name a row, and what reads it."""


def conversations_of_rows(
    rows: Iterator[NamedRow], options: ManifestOptions
) -> Iterator[Conversation]:
    """The conversations of rows, whose headers are read many at a time.

    Args:
        rows: the words that name each row, and what reads it.
        options: how they become conversations.
    """
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        read: list[tuple[str, ManifestRow]] = []
        for where, make in chunk:
            with located(where):
                read.append((where, make()))
        lengths = file_durations_s(location for _, row in read for location in row.unmeasured_files)
        for where, row in read:
            with located(where):
                conversation = row.conversation(lengths, options, where)
            if conversation is not None:
                yield conversation


def conversation_of_row(row: NamedRow, options: ManifestOptions) -> Conversation | None:
    """The conversation of one row, whose headers are read now; None for a row to be skipped.

    Raises SettingsError, naming the row.
    """
    where, make = row
    with located(where):
        read = make()
        return read.conversation(file_durations_s(read.unmeasured_files), options, where)


class NemoRow:
    """A row of a NeMo manifest: one recording and its transcript.

    Args:
        row: its fields.
        find: where recordings are.
        is_packed: whether recordings are in files of many, as tars are; NeMo cuts these to the
            declared duration.
        trusts_duration: whether a declared duration spares the header, as `sampling_rate` does.
    """

    def __init__(
        self,
        row: dict[str, Any],
        find: Find,
        *,
        is_packed: bool = False,
        trusts_duration: bool = False,
    ) -> None:
        self.audio = audio_name(row)
        self.location = find(self.audio)
        del row["audio_filepath"]
        check_channel(row.get("channel"))
        self.is_packed = is_packed
        self.declared_s = optional_seconds(row, "duration")
        self.offset_s = optional_seconds(row, "offset")
        rate = row.pop("sampling_rate", None)
        is_measured = (rate if rate is not None else row.pop("sample_rate", None)) is not None
        trusts_duration |= is_remote(self.location.path)  # a header would be a request for each
        is_measured |= trusts_duration and self.declared_s is not None
        if is_measured and self.declared_s is None:
            raise SettingsError(missing_key(row, "duration"))
        self.unmeasured_files = () if is_measured else (self.location,)
        self.own = row

    def conversation(self, lengths: Lengths, options: ManifestOptions, where: str) -> Conversation:
        """The recording and its text."""
        length_s = lengths[self.location] if self.unmeasured_files else None
        if length_s is None and self.declared_s is None and near_miss(self.own, "duration"):
            raise SettingsError(missing_key(self.own, "duration"))
        is_whole = self._is_whole(length_s)
        duration_s = stretch_s(self.declared_s, self.offset_s, length_s)
        if is_whole and length_s is not None and not is_cut_off(self.declared_s, None, length_s):
            duration_s = float(length_s)
        clip = AudioClip(
            id=self._clip_id(duration_s),
            path=self.location.path,
            byte_range=self.location.byte_range,
            cell=self.location.cell,
            storage=self.location.storage,
            offset_s=self.offset_s or 0.0,
            duration_s=duration_s,
            channel=options.channel,
            is_segment=not is_whole,
        )
        if not options.with_question:
            check_text_key(self.own, options.text_field)
        response, name = self.own.get(options.text_field), str(self.own.get("id") or clip.id)
        return conversation_of_recording(name, clip, response, self.own, options, where=where)

    def _is_whole(self, length_s: float | None) -> bool:
        """Whether the whole recording is meant, whose length its header gives."""
        if not self.is_packed:
            return self.offset_s is None
        if self.offset_s or length_s is None:
            return False
        return self.declared_s is None or abs(self.declared_s - length_s) < WHOLE_MEMBER_S

    def _clip_id(self, duration_s: float) -> str:
        """As in NeMo, which calls what is in a tar by the name of its member."""
        if self.is_packed:
            return self.audio
        if self.offset_s is None:
            return path_stem(self.audio)
        named_s = duration_s if self.declared_s is None else self.declared_s
        ends = "-".join(f"{round(one * 1e2):06d}" for one in (self.offset_s, named_s))
        return f"{path_stem(self.audio)}-{ends}"


class DialogFormat(NamedTuple):
    """A form of dialogs, for readers that find the recordings in a tar."""

    row: Callable[[dict[str, Any], Find], ManifestRow]
    names: Callable[[Mapping[str, Any]], list[str]]
    """The recordings that a row names, in order, whatever else is wrong with it."""


class DialogRow:
    """A row of a dialog: text and recordings, turn by turn."""

    def __init__(self, row: dict[str, Any], find: Find) -> None:
        self.fields = mapping(row.get("custom"), "custom")
        self.is_skipped = bool(self.fields.get("_skipme"))
        turns = [] if self.is_skipped else row.get("conversations")
        if turns is None:
            raise SettingsError(missing_key(row, "conversations"))
        if not isinstance(turns, list) or not (turns or self.is_skipped):
            raise SettingsError(f"conversations must be a list of turns, got {shown(turns)}")
        self.turns = [_Turn(turn, number, find) for number, turn in enumerate(turns, start=1)]
        self.unmeasured_files = tuple(
            t.location for t in self.turns if t.location and t.is_unmeasured
        )
        self.id = row.get("id")

    def conversation(
        self, lengths: Lengths, options: ManifestOptions, where: str
    ) -> Conversation | None:
        """The turns, after those that tags add; None for a row to be skipped."""
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


def _names(row: Mapping[str, Any]) -> list[str]:
    turns = row.get("conversations")
    return [
        turn["value"]
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, dict)
        and turn.get("type") == "audio"
        and isinstance(turn.get("value"), str)
    ]


DIALOGS = DialogFormat(row=DialogRow, names=_names)


class _Turn:
    """One turn of a row."""

    def __init__(self, turn: object, number: int, find: Find) -> None:
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
            is_audio = kind == "audio"
            self.location = find(named_file(self.value, "value")) if is_audio else None
            self.offset_s = optional_seconds(turn, "offset") or 0.0
            self.declared_s = optional_seconds(turn, "duration")
            # of a remote recording a header would be a request for each
            is_far = self.location is not None and is_remote(self.location.path)
            self.is_unmeasured = self.declared_s is None or not is_far

    def turn(self, lengths: Lengths, options: ManifestOptions) -> TextTurn | AudioTurn:
        """The turn; of a recording never more than its file has."""
        if self.location is None:
            return TextTurn(role=self.role, text=self.value)
        duration_s = stretch_s(self.declared_s, self.offset_s, lengths.get(self.location))
        clip = clip_of_turn(self.value, self.location, self.offset_s, duration_s, options)
        return AudioTurn(role=self.role, clip=clip, locator_tag=options.locator_tag)


def clip_of_turn(
    name: str,
    location: AudioLocation,
    offset_s: float,
    duration_s: float,
    options: ManifestOptions,
) -> AudioClip:
    """The recording of a turn, with the id that NeMo gives it."""
    ends = f"_{offset_s:.3f}_{duration_s:.3f}" if offset_s > 0 else ""
    return AudioClip(
        id=path_stem(name) + ends,
        path=location.path,
        byte_range=location.byte_range,
        cell=location.cell,
        storage=location.storage,
        offset_s=offset_s,
        duration_s=duration_s,
        channel=options.channel,
    )


def check_has_speakers(where: str, options: ManifestOptions) -> None:
    """Raises SettingsError if rows of one text each are to be dialogs of speakers."""
    if options.roles is not None:
        raise SettingsError(
            f"{where}: a NeMo manifest has no speakers; type s2s_as_conversation reads Lhotse cuts "
            "with a supervision for each turn"
        )


def audio_name(row: Mapping[str, Any]) -> str:
    """The recording that a row names. Raises SettingsError for a row that names none."""
    name = row.get("audio_filepath")
    if not isinstance(name, str):
        raise SettingsError(
            missing_key(row, "audio_filepath")
            if name is None
            else f"audio_filepath must be text, got {shown(name)}"
        )
    return named_file(name, "audio_filepath")


def stretch_s(declared_s: float | None, offset_s: float | None, length_s: float | None) -> float:
    """Seconds of a stretch: as declared, but no more than the file has from its offset on.

    0 of a file that cannot be opened and of which nothing is declared, which loading will report;
    a stretch behind the file's end, and a whole file of which much is missing, keep their declared
    length, for the same end: its text is that of the whole.
    """
    rest_s = None if length_s is None else length_s - (offset_s or 0.0)
    if declared_s is None:
        return max(rest_s or 0.0, 0.0)
    if rest_s is None or rest_s <= 0 or is_cut_off(declared_s, offset_s, length_s):
        return declared_s
    return min(declared_s, rest_s)


def is_cut_off(declared_s: float | None, offset_s: float | None, length_s: float | None) -> bool:
    """Whether a file lacks much of what is declared, as one that was not copied whole.

    Reading it as long as it is declared is an error then, whatever its format. A header that tells
    the length that is there is believed, as in NeMo, and segments may end with their file.
    """
    if declared_s is None or offset_s or not isinstance(length_s, FoundSeconds):
        return False
    missing_s = declared_s - length_s
    return missing_s > min(LOSSY_TOLERANCE_S, LOSSY_TOLERANCE_SHARE * declared_s)


def optional_seconds(row: dict[str, Any], key: str) -> float | None:
    """Takes a time or duration out of a row; None if it is missing or null."""
    value = row.pop(key, None)
    return None if value is None else seconds(value, key)
