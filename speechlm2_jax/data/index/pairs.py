"""The rows of two texts whose lines are pairs (`txt_pair`), by their common index."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.counts import Counts
from speechlm2_jax.data.index.folders import state_of_file
from speechlm2_jax.data.index.mapped_rows import MappedRows
from speechlm2_jax.data.index.opening import IndexSource, open_index
from speechlm2_jax.data.index.row_columns import PAIR_TYPES, no_recordings
from speechlm2_jax.data.index.row_kinds import TXT_PAIR, RowKind, TextPair
from speechlm2_jax.data.index.texts import PlainText, line_at
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.json_lines import decoded_line, is_gzip
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.text_readers import pair_of_lines, paths_of_pairs, questions_of


@dataclass(frozen=True, kw_only=True)
class PairIndex(MappedRows):
    """The pairs of two files: columns in mapped memory, and each row as a conversation."""

    source: PlainText
    target: PlainText
    questions: Sequence[str]
    """One of which comes before each source; none: nothing does."""
    how: ManifestOptions

    @property
    def options(self) -> ManifestOptions:
        """How rows become conversations."""
        return self.how

    def conversation(self, row: int) -> Conversation:
        """The conversation of a row, read from both files."""
        where, columns = f"{self.source.path} line {row + 1}", self.columns
        asked = self.questions[int(columns["question"][row])] if self.questions else None
        return pair_of_lines(
            where,
            decoded_line(where, line_at(self.source, int(columns["offset"][row]))),
            decoded_line(where, line_at(self.target, int(columns["target"][row]))),
            asked,
            self.options,
        )


def open_pairs(
    entry: InputConfig, options: ManifestOptions, counts: Counts
) -> list[PairIndex] | None:
    """Opens the indexes of the pairs of files of an entry, which are built first if need be.

    None for compressed files. Raises SettingsError, naming the line, for one that cannot be read.
    """
    pairs = paths_of_pairs(entry.source_paths or (), entry.target_paths or ())
    if any(is_gzip(path) for pair in pairs for path in pair):
        return None
    first, found = 0, list[PairIndex]()
    for source, target in pairs:
        pair = TextPair(target=target, questions=entry.questions_path, first=first)
        found.append(_open(source, pair, options, counts))
        first += len(found[-1]) if pair.questions else 0
    return found


def _open(source: Path, pair: TextPair, options: ManifestOptions, counts: Counts) -> PairIndex:
    of = IndexSource(
        manifest=source,
        options=options,
        kind=RowKind(name=TXT_PAIR, pair=pair),
        state=partial(_state, source, pair),
        columns=tuple(PAIR_TYPES),
    )
    opened = open_index(of, counts)
    return PairIndex(
        how=options,
        source=PlainText(source),
        target=PlainText(pair.target),
        questions=questions_of(pair.questions),
        columns={**opened.columns, **no_recordings(len(opened.columns["flags"]))},
        identity=opened.identity,
        folders=opened.folders,
    )


def _state(source: Path, pair: TextPair) -> dict[str, Any]:
    """How both files are now, and the questions."""
    return {
        **state_of_file(source),
        "target": state_of_file(pair.target),
        "questions": questions_of(pair.questions),
    }
