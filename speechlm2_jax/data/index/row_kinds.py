"""What the lines of a file are, and how one becomes a conversation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.data.audio_location import AudioLocation
from speechlm2_jax.data.conversations import AnyConversation, Conversation
from speechlm2_jax.data.cuts import clip_of_cut, conversation_of_cut, cut_of_row
from speechlm2_jax.data.duplex.forms import DuplexForm
from speechlm2_jax.data.index.folders import digest
from speechlm2_jax.data.json_lines import decoded_line, object_of_line
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_rows import DialogRow, Lengths, ManifestRow, NemoRow
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.parquet import ParquetColumns
from speechlm2_jax.data.paths import Finder
from speechlm2_jax.data.shar import SharCut
from speechlm2_jax.data.share_gpt import ShareGptRow, finder_of
from speechlm2_jax.data.spoken_dialogs import UnknownSpeakerError
from speechlm2_jax.data.storage.access import using
from speechlm2_jax.data.text_readers import chat_of_object, text_of_line, text_of_object

NEMO, DIALOGS, CUTS, SHARE_GPT = "nemo", "dialogs", "cuts", "share_gpt"
DUPLEX_CUTS = "duplex_cuts"
TXT, TXT_JSONL, SFT, TXT_PAIR = "txt", "txt_jsonl", "nemo_sft_jsonl", "txt_pair"


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """What goes with the lines of a text."""

    target: Path
    """The text of the responses, line by line."""
    questions: str | None = None
    """A file of which a line comes before each pair."""
    first: int = 0
    """Pairs of the entry before these, for which questions are drawn too."""


@dataclass(frozen=True, kw_only=True)
class RowKind:
    """What the rows of files are."""

    name: str
    placeholders: tuple[str, ...] = ()
    """Of ShareGPT: what stands for a recording in a text."""
    audio_root: str | None = None
    """Of ShareGPT: the folder of relative paths; None: that of the file."""
    table: ParquetColumns | None = None
    """Of tables: the names of columns."""
    pair: TextPair | None = None
    """Of pairs of lines."""
    duplex: DuplexForm | None = None
    """Of two voices: how rows become conversations of them."""

    def key(self, options: ManifestOptions) -> str:
        """Changes with what places and durations of rows depend on, beside the files."""
        own: list[object] = []
        if self.placeholders:
            own = [self.placeholders, self.audio_root]
        elif self.name == TXT_JSONL:
            own = [options.text_field]
        elif options.roles is not None:
            own = [options.roles.users, options.roles.assistants]
        own += [self.table.audio, self.table.duration] if self.table else []
        own += [str(self.pair.target), self.pair.first, options.seed] if self.pair else []
        own += self.duplex.key if self.duplex else []
        return f"{self.name}-{digest(own)}" if own else self.name

    @property
    def has_recordings(self) -> bool:
        """Whether rows name recordings."""
        return self.name in (NEMO, DIALOGS, CUTS, SHARE_GPT, DUPLEX_CUTS)

    def finished(self, made: AnyConversation | None) -> Any:
        """What a row that was read becomes: of two voices, if it is to be so."""
        return made if self.duplex is None or made is None else self.duplex.finished(made)


class RowMaker:
    """Reads the lines of one file.

    Args:
        file: its path, to which those of recordings may be relative.
        options: how rows become conversations.
        kind: of its rows.
    """

    def __init__(self, file: Path, options: ManifestOptions, kind: RowKind) -> None:
        self._options, self._kind = options, kind
        is_share_gpt = kind.name == SHARE_GPT
        self._finder = finder_of(file, kind.audio_root) if is_share_gpt else Finder(file)
        self._make = _MAKERS[kind.name]

    def __call__(self, where: str, line: bytes) -> ManifestRow | None:
        """A line that is not blank; None for one to be skipped. Raises SettingsError."""
        if self._kind.name == TXT:
            return _Made(text_of_line(decoded_line(where, line), self._options, where))
        return self.of_object(where, object_of_line(where, line))

    def of_object(self, where: str, row: dict[str, Any]) -> ManifestRow | None:
        """The same of a line's object."""
        if self._kind.name in (NEMO, DIALOGS) and row.pop("_skipme", False):
            return None
        with located(where):
            return self._make(self, row, where)

    def find(self, name: str) -> AudioLocation:
        """Where a recording is."""
        return AudioLocation(self._finder(name), storage=self._finder.storage)

    def nemo(self, row: dict[str, Any], where: str) -> ManifestRow:
        """A recording and its transcript."""
        return NemoRow(row, self.find)

    def dialog(self, row: dict[str, Any], where: str) -> ManifestRow:
        """Turns of texts and recordings."""
        return DialogRow(row, self.find)

    def cut(self, row: dict[str, Any], where: str) -> ManifestRow:
        """A Lhotse cut."""
        return _CutRow(row, self._finder)

    def duplex_cut(self, row: dict[str, Any], where: str) -> ManifestRow:
        """A Lhotse cut of two voices."""
        assert self._kind.duplex is not None
        with using(self._finder.storage):
            cut = cut_of_row(row, self._kind.duplex.fields, self._finder)
            return _Made(self._kind.duplex.of_cut(SharCut(cut=cut, where=where)))

    def share_gpt(self, row: dict[str, Any], where: str) -> ManifestRow:
        """Turns of texts with placeholders."""
        return ShareGptRow(row, self.find, self._kind.placeholders)

    def text(self, row: dict[str, Any], where: str) -> ManifestRow:
        """A text."""
        return _Made(text_of_object(row, self._options, where))

    def chat(self, row: dict[str, Any], where: str) -> ManifestRow:
        """A chat of texts."""
        return _Made(chat_of_object(row, self._options, where))


Maker = Callable[[RowMaker, dict[str, Any], str], ManifestRow]
_MAKERS: Mapping[str, Maker] = {
    NEMO: RowMaker.nemo,
    DIALOGS: RowMaker.dialog,
    CUTS: RowMaker.cut,
    DUPLEX_CUTS: RowMaker.duplex_cut,
    SHARE_GPT: RowMaker.share_gpt,
    TXT: RowMaker.text,
    TXT_JSONL: RowMaker.text,
    SFT: RowMaker.chat,
}


@dataclass
class _Made:
    """A row without recordings, or none whose headers are read."""

    made: Any
    unmeasured_files: tuple[AudioLocation, ...] = ()

    def conversation(self, lengths: Lengths, options: ManifestOptions, where: str) -> Any:
        return self.made


class _CutRow:
    """A Lhotse cut, whose lengths are its manifest's."""

    unmeasured_files: tuple[AudioLocation, ...] = ()

    def __init__(self, row: dict[str, Any], finder: Finder) -> None:
        self._cut, self._storage = cut_of_row(row, (), finder), finder.storage

    def conversation(
        self, lengths: Lengths, options: ManifestOptions, where: str
    ) -> Conversation | None:
        clip = clip_of_cut(self._cut, options.channel, self._storage)
        try:
            return conversation_of_cut(self._cut, clip, options, where=where)
        except UnknownSpeakerError:
            return None
