"""`Prompt`, one dialog as token ids, and what makes prompts of dialogs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from speechlm2_jax.settings import SettingsError

Turn = Mapping[str, Any]
"""`role` with either `content`, for roles of one field, or NeMo's `slots`: {field: text}."""


class PromptError(SettingsError):
    """A dialog that the format cannot express, or an unknown format."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One dialog as token ids."""

    input_ids: Int[np.ndarray, " L"]
    """The whole dialog. For inference it ends with the generation prompt."""
    context_ids: Int[np.ndarray, " C"]
    """Everything before the last turn if that is the model's, else the same as `input_ids`."""
    prompt_ids: Int[np.ndarray, " Q"]
    """The prompt that generates the last turn: the context and the generation prompt."""
    answer_ids: Int[np.ndarray, " A"] | None = None
    """The last turn if it is the model's."""
    mask: Bool[np.ndarray, " L"] | None = None
    """True at the tokens of responses (the loss mask); None for inference."""


class PromptLengths(NamedTuple):
    """How many tokens the prompt of a dialog has."""

    tokens: int
    """Of the whole."""
    context: int
    """Before the last turn if that is the model's, else of the whole."""
    placeholders: int
    """Those that stand for recordings."""
    has_response: bool
    """Whether the last turn is the model's."""


class DialogEncoder(Protocol):
    """What a prompt format does with dialogs."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that a turn may have."""
        ...

    @property
    def can_think(self) -> bool:
        """Whether `enable_thinking` has an effect."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, if the format knows more of them than the tokenizer."""
        ...

    def encode(
        self, dialogs: Sequence[Sequence[Turn]], enable_thinking: bool | None
    ) -> list[Prompt]:
        """Encodes many dialogs. Raises PromptError for one that the format cannot express."""
        ...

    def lengths(
        self, dialogs: Sequence[Sequence[Turn]], placeholder_id: int
    ) -> list[PromptLengths]:
        """The lengths of what `encode` gives, in less time."""
        ...

    def dialog(self, turns: list[Turn]) -> list[Turn]:
        """Puts a system turn at the beginning where the format wants its text."""
        ...
