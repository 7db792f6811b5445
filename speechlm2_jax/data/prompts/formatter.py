"""`PromptFormatter`: from the turns of a dialog to token ids."""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import groupby

from speechlm2_jax.data.prompts.format_encoder import FormatEncoder
from speechlm2_jax.data.prompts.formats import AUTO, FORMATS
from speechlm2_jax.data.prompts.prompt import (
    DialogEncoder,
    Prompt,
    PromptError,
    PromptLengths,
    Turn,
)
from speechlm2_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class PromptFormatter:
    """Encodes dialogs in one format with one tokenizer.

    Args:
        name: a key of FORMATS; `auto` for the chat template of the tokenizer, which is what None
            means where the tokenizer has one.
        tokenizer: it must have the tokens that the format is written with.

    Raises PromptError for an unknown format, and for None without a chat template; TokenizerError
    for a tokenizer that lacks a token of the format.
    """

    def __init__(self, name: str | None, tokenizer: Tokenizer) -> None:
        self.name = _default(tokenizer) if name is None else name
        self.tokenizer = tokenizer
        self._encoder = _encoder(self.name, tokenizer)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that a turn may have."""
        return self._encoder.roles

    @property
    def can_think(self) -> bool:
        """Whether responses may open with a thought, so that `enable_thinking` has an effect."""
        return self._encoder.can_think

    @property
    def end_ids(self) -> tuple[int, ...]:
        """`auto`: the special tokens that the template writes after a response; else nothing."""
        return self._encoder.end_ids

    def encode_dialog(
        self, turns: Sequence[Turn], *, enable_thinking: bool | None = None
    ) -> Prompt:
        """Encodes one dialog; one whose last turn is the user's ends with the generation prompt.

        Without `enable_thinking`, a thinking format puts an empty thought before the response; None
        is the format's default. Raises PromptError for an empty dialog, an unknown role, a missing
        field, and a dialog that a chat template refuses.
        """
        return self.encode_dialogs([turns], enable_thinking=enable_thinking)[0]

    def encode_dialogs(
        self, dialogs: Sequence[Sequence[Turn]], *, enable_thinking: bool | None = None
    ) -> list[Prompt]:
        """Encodes many dialogs with one call of the tokenizer."""
        return self._encoder.encode(dialogs, enable_thinking)

    def lengths(
        self, dialogs: Sequence[Sequence[Turn]], placeholder_id: int
    ) -> list[PromptLengths]:
        """The lengths of what `encode_dialogs` gives, in less time; raises as it does."""
        return self._encoder.lengths(dialogs, placeholder_id)

    def dialog(self, messages: Sequence[tuple[str, str]]) -> list[Turn]:
        """Makes turns of (role, text): runs of one role are joined by a space.

        A system text goes to the format's system turn, or into its first user turn where the
        format has a place for it there (llama2). Raises PromptError where it has none.
        """
        runs = groupby(messages, key=lambda message: message[0])
        return self._encoder.dialog(
            [
                {"role": role, "slots": {"message": " ".join(text for _, text in run)}}
                for role, run in runs
            ]
        )


def _default(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise PromptError(
            f"required, because tokenizer {tokenizer.name} has no chat template; set it to one of "
            f"{', '.join(FORMATS)}"
        )
    return AUTO


def _encoder(name: str, tokenizer: Tokenizer) -> DialogEncoder:
    if name == AUTO:
        from speechlm2_jax.data.prompts.template_encoder import TemplateEncoder

        return TemplateEncoder(tokenizer)
    if name not in FORMATS:
        raise PromptError(f"unknown prompt format {name!r}; known: {', '.join((AUTO, *FORMATS))}")
    _compare(name, tokenizer)
    return FormatEncoder(name, tokenizer)


def _compare(name: str, tokenizer: Tokenizer) -> None:
    """Warns once if the tokenizer's chat template has none of a format's plain-text markup."""
    markup, source = FORMATS[name].plain_markup, tokenizer.chat_template
    if source is not None and markup and not all(text in source for text in markup):
        _warn_of_other_template(name, tokenizer.name, markup[0])


@cache
def _warn_of_other_template(name: str, tokenizer: str, markup: str) -> None:
    log.warning(
        "prompt format %r writes %r, but the chat template of tokenizer %s writes dialogs in "
        "another way; prompt_format: auto would take that template",
        *(name, markup, tokenizer),
    )
