"""Rows of a list in memory beside those of an index: of what cannot be indexed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from speechlm2_jax.data.index.counts import Counts
from speechlm2_jax.data.index.row_columns import row_columns

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class ListRows:
    """Conversations in memory, and their columns."""

    conversations: Sequence[Any]
    columns: Mapping[str, np.ndarray]
    identity: str
    locator_tags: frozenset[str] = frozenset()
    """Of one voice: the tokens that stand for recordings."""
    folders: tuple[Path, ...] = ()

    @classmethod
    def of(
        cls, conversations: Sequence[Any], counts: Counts, locator_tags: frozenset[str]
    ) -> "ListRows":
        """Counts and measures. Raises PromptError, naming the conversation."""
        count, parts = counts.counter(), list[Mapping[str, np.ndarray]]()
        for start in range(0, max(len(conversations), 1), _ROWS_AT_ONCE):
            parts.append(count(list(conversations[start : start + _ROWS_AT_ONCE])))
        counted = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        columns = {**row_columns([(0, 0)] * len(conversations), conversations), **counted}
        checksum = xxhash.xxh3_64()
        for name in sorted(columns):
            checksum.update(columns[name].tobytes())
        checksum.update("\0".join(one.id for one in conversations).encode("utf-8", "replace"))
        return cls(
            conversations=conversations,
            columns=columns,
            identity=checksum.hexdigest(),
            locator_tags=locator_tags,
        )

    @property
    def token_equivalent_s(self) -> float | None:
        """Seconds of audio that count as one token: the same for all of an entry."""
        return self.conversations[0].token_equivalent_duration_s if self.conversations else None

    def conversation(self, row: int) -> Any:
        """The conversation of a row."""
        return self.conversations[row]

    def __len__(self) -> int:
        return len(self.conversations)
