"""Rows of a list in memory beside those of an index: of what cannot be indexed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.row_columns import prompt_columns, row_columns
from speechlm2_jax.data.index.worker import prompt_lengths
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.salm_contents import locator_tags_of, placeholder_or_none

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class ListRows:
    """Conversations in memory, and their columns."""

    conversations: Sequence[Conversation]
    columns: Mapping[str, np.ndarray]
    identity: str
    locator_tags: frozenset[str]
    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, conversations: Sequence[Conversation], formatter: PromptFormatter) -> "ListRows":
        """Tokenises and measures. Raises PromptError, naming the conversation."""
        tags = locator_tags_of(conversations)
        placeholder_id = placeholder_or_none(tags, formatter.tokenizer)
        parts: list[Mapping[str, np.ndarray]] = []
        for start in range(0, len(conversations), _ROWS_AT_ONCE):
            chunk = list(conversations[start : start + _ROWS_AT_ONCE])
            lengths = prompt_lengths(chunk, formatter, placeholder_id)
            parts.append(prompt_columns(chunk, lengths))
        of_rows = row_columns([(0, 0)] * len(conversations), conversations)
        of_prompts = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        columns = {**of_rows, **of_prompts}
        checksum = xxhash.xxh3_64()
        for name in sorted(columns):
            checksum.update(columns[name].tobytes())
        checksum.update("\0".join(one.id for one in conversations).encode("utf-8", "replace"))
        return cls(
            conversations=conversations,
            columns=columns,
            identity=checksum.hexdigest(),
            locator_tags=frozenset(tags),
        )

    @property
    def token_equivalent_s(self) -> float | None:
        """Seconds of audio that count as one token: the same for all of an entry."""
        return self.conversations[0].token_equivalent_duration_s if self.conversations else None

    def conversation(self, row: int) -> Conversation:
        """The conversation of a row."""
        return self.conversations[row]

    def __len__(self) -> int:
        return len(self.conversations)
