"""What an index counts of the texts of rows, beside their places and lengths."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.index.row_columns import PROMPT_TYPES, prompt_columns
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.prompts import PromptError, PromptFormatter, PromptLengths
from speechlm2_jax.data.tokenizer import Tokenizer

VERSION = 3
"""Of what is in an index; another one is built again."""
_OF_NO_PROMPT = ("token_equivalent_duration_s", "channel", "skip_missing")
"""Fields of ManifestOptions that change no token."""
_PROBE_TEXT = "Ein Beispiel, 2 tests: naïve \u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442!"
_PROBE_TURNS = (("system", "a b"), ("user", "c d"), ("assistant", "e f"), ("user", "g"))

Count = Callable[[Sequence[Any]], dict[str, np.ndarray]]
"""The columns of conversations; None is a row without one."""


class Counts(Protocol):
    """How texts are counted. Columns are kept for each way, beside those of places."""

    NAME: ClassVar[str]
    """Of the folder of the columns."""
    TYPES: ClassVar[Mapping[str, np.dtype]]
    """Of the columns."""

    def key(self, options: ManifestOptions) -> list[Any]:
        """What the columns depend on, beside the rows."""
        ...

    def counter(self) -> Count:
        """What counts. Raises SettingsError for settings that contradict each other."""
        ...


@dataclass(frozen=True, kw_only=True)
class PromptCounts:
    """Counts the tokens of prompts."""

    tokenizer: Tokenizer
    prompt_format: str | None
    placeholder_id: int

    NAME: ClassVar[str] = "prompts"
    TYPES: ClassVar[Mapping[str, np.dtype]] = PROMPT_TYPES

    def key(self, options: ManifestOptions) -> list[Any]:
        """What token counts depend on, beside the rows."""
        tokenizer = self.tokenizer
        formatter = PromptFormatter(self.prompt_format, tokenizer)
        return [
            VERSION,
            *(tokenizer.contents, len(tokenizer), sorted(tokenizer.added_tokens)),
            tokenizer.text_to_ids(_PROBE_TEXT),
            *(formatter.name, tokenizer.chat_template, self.placeholder_id),
            [_probed(formatter, count) for count in range(1, len(_PROBE_TURNS) + 1)],
            {name: value for name, value in asdict(options).items() if name not in _OF_NO_PROMPT},
        ]

    def counter(self) -> Count:
        """What counts. Raises SettingsError if the prompt format does not suit the tokenizer."""
        formatter = PromptFormatter(self.prompt_format, self.tokenizer)

        def count(conversations: Sequence[Conversation | None]) -> dict[str, np.ndarray]:
            present = [one for one in conversations if one is not None]
            rest = iter(prompt_lengths(present, formatter, self.placeholder_id))
            return prompt_columns(
                conversations, [None if one is None else next(rest) for one in conversations]
            )

        return count


def prompt_lengths(
    conversations: list[Conversation], formatter: PromptFormatter, placeholder_id: int
) -> list[PromptLengths]:
    """The lengths of the prompts of conversations. Raises PromptError, naming the conversation."""
    try:
        dialogs = [formatter.dialog(one.messages()) for one in conversations]
        return formatter.lengths(dialogs, placeholder_id)
    except PromptError as error:
        if len(conversations) == 1:
            raise PromptError(f"conversation {conversations[0].id!r}: {error}") from error
        parts = (prompt_lengths([one], formatter, placeholder_id) for one in conversations)
        return [length for part in parts for length in part]


def _probed(formatter: PromptFormatter, count: int) -> int | None:
    """The length of a prompt, which may change with the day if a template writes the date."""
    try:
        return len(formatter.encode_dialog(formatter.dialog(_PROBE_TURNS[:count])).input_ids)
    except PromptError:
        return None
