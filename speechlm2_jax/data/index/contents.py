"""A large data set of a SALM: each conversation is read from its manifest when it is needed."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from jaxtyping import Int

from speechlm2_jax.batches import BatchShape
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.bucketing import Members
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.salm_columns import Rows, token_lengths
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.salm_contents import salm_columns, salm_shape
from speechlm2_jax.data.salm_examples import SalmExamples
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.settings import SettingsError

_BLOCK_ROWS = 1 << 16
KEPT_IN_MEMORY = 2048
"""Conversations that were read last."""


class Part(Rows, Protocol):
    """The rows of one manifest, or of a list in memory."""

    @property
    def identity(self) -> str:
        """Changes with its rows, and with what their lengths depend on."""
        ...

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its index may be; none of a list."""
        ...

    @property
    def locator_tags(self) -> frozenset[str]:
        """The tokens that stand for recordings."""
        ...


@dataclass(frozen=True, kw_only=True)
class IndexedRows(Sequence[Conversation]):
    """The rows of the manifests of one entry, read when they are asked for."""

    manifests: tuple[Part, ...]
    fields: Mapping[str, object] = field(default_factory=dict)
    """Of the groups around the entry, for all of its conversations."""

    def __len__(self) -> int:
        return sum(map(len, self.manifests))

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        for manifest in self.manifests:
            if index < len(manifest):
                made = manifest.conversation(index)
                return replace(made, fields={**made.fields, **self.fields})
            index -= len(manifest)
        raise IndexError(index)


@dataclass(frozen=True, kw_only=True)
class IndexedContents(SalmExamples):
    """What is kept of all rows, as conversations with token ids (as `SalmContents`)."""

    formatter: PromptFormatter
    parts: tuple[Part, ...]
    fields: tuple[Mapping[str, object], ...]
    """More fields of the conversations of each part."""
    row: Int[np.ndarray, " N"] | None
    """The row of each conversation, counted over all parts; None: every row is one."""
    count: int
    """Conversations."""
    identity: str
    """Changes with the rows, and with what their order and lengths depend on."""

    @property
    def conversations(self) -> "IndexedContents":
        """Itself: a sequence of conversations."""
        return self

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        """A conversation with its token ids. Raises AudioError if its row has changed."""
        return self._read(index)

    def _conversation(self, index: int) -> Conversation:
        return self[index]

    def shape(self, members: Members) -> BatchShape:
        """The shape of a bucket."""
        return salm_shape(members, self.config.sample_rate)

    def columns(self, shape: BatchShape) -> dict[str, str]:
        """Clips, and seconds of the longest."""
        return salm_columns(shape, self.config.sample_rate)

    def token_lengths(self) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Tokens before the last turn, and of the whole, of each conversation."""
        found = [
            token_lengths(part, start, min(start + _BLOCK_ROWS, len(part)))
            for part in self.parts
            for start in range(0, len(part), _BLOCK_ROWS)
        ]
        inputs, totals = map(np.concatenate, zip(*found, strict=True))
        return (inputs, totals) if self.row is None else (inputs[self.row], totals[self.row])

    @functools.cached_property
    def _firsts(self) -> Int[np.ndarray, " parts"]:
        return np.cumsum([0, *map(len, self.parts)])

    @functools.cached_property
    def _read(self) -> "functools._lru_cache_wrapper[Conversation]":
        return functools.lru_cache(KEPT_IN_MEMORY)(self._read_one)

    def name(self, index: int) -> str:
        """The id of a conversation, for messages; of a row that has changed, its number."""
        try:
            return self[index].id
        except AudioError:
            return f"row {self._place(index)[1] + 1}"

    def _place(self, index: int) -> tuple[int, int]:
        """The part of a conversation, and its row there."""
        place = index if self.row is None else int(self.row[index])
        part = int(np.searchsorted(self._firsts, place, side="right")) - 1
        return part, place - int(self._firsts[part])

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads conversations itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def _read_one(self, index: int) -> Conversation:
        number, row = self._place(index)
        part = self.parts[number]
        try:
            made = part.conversation(row)
            prompt = self.formatter.encode_dialog(self.formatter.dialog(made.messages()))
        except (SettingsError, OSError) as error:
            if isinstance(error, StorageError):
                raise AudioError(str(error), cause=error.cause) from error
            raise AudioError(f"changed since it was indexed: {error}", cause="changed") from error
        columns = part.columns
        is_same = len(prompt.input_ids) == columns["tokens"][row] and (
            len(made.clips) == columns["clips"][row]
        )
        if not is_same or made.audio_duration_s != columns["duration_s"][row]:
            raise AudioError(f"{made.where}: changed since it was indexed", cause="changed")
        return replace(made, prompt=prompt, fields={**made.fields, **self.fields[number]})
