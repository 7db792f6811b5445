"""A large data set: each conversation is read from its manifest when it is needed."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.bucketing import Measures
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.settings import SettingsError

KEPT_IN_MEMORY = 2048
"""Conversations that were read last."""


class Part(Protocol):
    """The rows of one manifest, or of a list in memory."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Those of `row_columns` and of `Counts`, but for the places of lines in a list."""
        ...

    @property
    def identity(self) -> str:
        """Changes with its rows, and with what their lengths depend on."""
        ...

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where its index may be; none of a list."""
        ...

    def conversation(self, row: int) -> Any:
        """The conversation of a row that is not skipped."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class IndexedRows(Sequence[Any]):
    """The rows of the manifests of one entry, read when they are asked for."""

    manifests: tuple[Any, ...]
    """Each a `Part`."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """Of the groups around the entry, for all of its conversations of one voice."""

    def __len__(self) -> int:
        return sum(map(len, self.manifests))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        for manifest in self.manifests:
            if index < len(manifest):
                made = manifest.conversation(index)
                is_one_voice = isinstance(made, Conversation)
                return (
                    replace(made, fields={**made.fields, **self.fields}) if is_one_voice else made
                )
            index -= len(manifest)
        raise IndexError(index)


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """The rows of a data set that are its conversations."""

    fields: tuple[Mapping[str, object], ...]
    """More fields of the conversations of each part, if they have one voice."""
    row: Int[np.ndarray, " N"] | None
    """The row of each conversation, counted over all parts; None: every row is one."""
    count: int
    """Conversations."""
    identity: str
    """Changes with the rows, and with what their order and lengths depend on."""


@dataclass(frozen=True, kw_only=True)
class IndexedContents(ABC):
    """What is kept of all rows (implements `prepare.BatchContents` with its subclasses)."""

    parts: tuple[Part, ...]
    kept: KeptRows

    @property
    def row(self) -> Int[np.ndarray, " N"] | None:
        """The row of each conversation, counted over all parts; None: every row is one."""
        return self.kept.row

    @property
    def identity(self) -> str:
        """Changes with the rows, and with what their order and lengths depend on."""
        return self.kept.identity

    @property
    def conversations(self) -> "IndexedContents":
        """Itself: a sequence of conversations."""
        return self

    def __len__(self) -> int:
        return self.kept.count

    def __getitem__(self, index: int) -> Any:
        """A conversation. Raises AudioError if its row has changed."""
        return self._read(index)

    def name(self, index: int) -> str:
        """The id of a conversation, for messages; of a row that has changed, its number."""
        try:
            return self[index].id
        except AudioError:
            return f"row {self._place(index)[1] + 1}"

    @abstractmethod
    def measured(self, indices: Sequence[int]) -> Measures:
        """Lengths of some conversations."""
        ...

    def validation_error(self, planned: Callable[[], Int[np.ndarray, " n"]]) -> str | None:
        """Why a model must not be trained on these conversations; None if it may."""
        return None

    @abstractmethod
    def _finished(self, number: int, row: int) -> Any:
        """The conversation of a row of a part, ready to be used.

        Raises SettingsError or OSError if it cannot be read, AudioError if it has changed.
        """
        ...

    @functools.cached_property
    def _firsts(self) -> Int[np.ndarray, " parts"]:
        return np.cumsum([0, *map(len, self.parts)])

    @functools.cached_property
    def _read(self) -> "functools._lru_cache_wrapper[Any]":
        return functools.lru_cache(KEPT_IN_MEMORY)(self._read_one)

    def _place(self, index: int) -> tuple[int, int]:
        """The part of a conversation, and its row there."""
        place = index if self.row is None else int(self.row[index])
        part = int(np.searchsorted(self._firsts, place, side="right")) - 1
        return part, place - int(self._firsts[part])

    def _column(self, name: str, indices: Int[np.ndarray, " n"]) -> np.ndarray:
        """The values of a column for some conversations."""
        places = indices if self.row is None else np.asarray(self.row[indices], np.int64)
        part_of = np.searchsorted(self._firsts, places, side="right") - 1
        values = np.zeros(len(places), self.parts[0].columns[name].dtype)
        for number in np.unique(part_of).tolist():
            is_own = part_of == number
            rows = places[is_own] - int(self._firsts[number])
            values[is_own] = self.parts[number].columns[name][rows]
        return values

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads conversations itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_read"}

    def _read_one(self, index: int) -> Any:
        try:
            return self._finished(*self._place(index))
        except (SettingsError, OSError) as error:
            if isinstance(error, StorageError):
                raise AudioError(str(error), cause=error.cause) from error
            raise AudioError(f"changed since it was indexed: {error}", cause="changed") from error
