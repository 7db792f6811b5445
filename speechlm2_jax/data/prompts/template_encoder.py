"""Prompt format `auto`: dialogs as the tokenizer's own chat template writes them."""

from collections.abc import Sequence
from contextvars import copy_context
from datetime import datetime

import numpy as np

from speechlm2_jax.data.prompts.chat_template import (
    ChatTemplate,
    Rendered,
    Responses,
    TemplateCache,
)
from speechlm2_jax.data.prompts.prompt import Prompt, PromptError, Turn
from speechlm2_jax.data.prompts.template_sandbox import NOW
from speechlm2_jax.data.prompts.thinking import OUTPUT_ROLE, Message
from speechlm2_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", OUTPUT_ROLE)


class TemplateEncoder:
    """Encodes dialogs as the tokenizer's chat template writes them.

    The text of a whole dialog is tokenised at once, so its ids are those of `apply_chat_template`.
    Raises PromptError for a tokenizer without a template, and for a template that does not work.
    """

    roles = ROLES

    def __init__(self, tokenizer: Tokenizer) -> None:
        source = tokenizer.chat_template
        if source is None:
            raise PromptError(
                f"prompt format 'auto' needs a chat template, which tokenizer {tokenizer.name} "
                "lacks; set prompt_format to a format by its name"
            )
        self._tokenizer = tokenizer
        self._template = ChatTemplate(
            source, tokenizer.name, tokenizer.special_tokens, tokenizer.added_tokens
        )
        self._template.render([Message("user", "?")], add_generation_prompt=True)
        self.end_ids = self._end_ids()

    @property
    def can_think(self) -> bool:
        """Whether the template reads `enable_thinking`."""
        return self._template.can_think

    def _end_ids(self) -> tuple[int, ...]:
        """The special tokens that the template writes after a last response."""
        try:
            tail = TemplateCache(self._template, None).turn_after((Message("user", "?"),)).tail
        except PromptError:  # a template that wants other turns first
            return ()
        ids = [self._tokenizer.token_to_id(token) for token in self._template.markers_in(tail)]
        return tuple(index for index in ids if index is not None)

    def dialog(self, turns: list[Turn]) -> list[Turn]:
        """The turns: a chat template itself has the place for a system turn."""
        return turns

    def encode(
        self, dialogs: Sequence[Sequence[Turn]], enable_thinking: bool | None
    ) -> list[Prompt]:
        """Encodes many dialogs at one time of day. Raises PromptError."""
        context = copy_context()  # all renderings of one call are of the same moment
        context.run(NOW.set, datetime.now())
        return context.run(self._encode, dialogs, enable_thinking)

    def _encode(
        self, dialogs: Sequence[Sequence[Turn]], enable_thinking: bool | None
    ) -> list[Prompt]:
        cache = TemplateCache(self._template, enable_thinking)
        written = [self._write(turns, cache) for turns in dialogs]
        encoded = iter(
            self._tokenizer.texts_with_offsets([r.text for r, found in written if found])
        )
        prompts = iter(
            self._tokenizer.texts_to_ids([f.prompt if f else r.text for r, f in written])
        )
        return [
            _inference(next(prompts))
            if found is None
            else _training(*next(encoded), found, next(prompts))
            for _, found in written
        ]

    def _write(
        self, turns: Sequence[Turn], cache: TemplateCache
    ) -> tuple[Rendered, Responses | None]:
        """The text of a dialog, and its responses if the last turn is the model's."""
        if not turns:
            raise PromptError("an empty dialog cannot be encoded")
        messages = [_message(turn) for turn in turns]
        is_response = messages[-1].role == OUTPUT_ROLE
        if is_response and len(messages) == 1:
            raise PromptError(f"a dialog must not begin with a turn of role {OUTPUT_ROLE!r}")
        rendered = cache.render(messages, add_generation_prompt=not is_response)
        self._check_texts(messages, rendered.text)
        if not is_response:
            return rendered, None
        return rendered, self._template.responses(messages, rendered, cache)

    def _check_texts(self, messages: Sequence[Message], rendered: str) -> None:
        """Raises PromptError for a turn whose text is not in the dialog, spaces aside."""
        written = "".join(rendered.split())
        for role, text in messages:
            part = text.rpartition("</think>")[2] if role == OUTPUT_ROLE else text
            if "".join(part.split()) not in written:
                raise PromptError(
                    f"the chat template of tokenizer {self._tokenizer.name} leaves out the text "
                    f"of a turn of role {role!r}; leave the turn out, or set prompt_format to "
                    "another format"
                )


def _message(turn: Turn) -> Message:
    role = str(turn.get("role"))
    if role not in ROLES:
        raise PromptError(f"prompt format 'auto' has no role {role!r}; roles: {', '.join(ROLES)}")
    text = turn["content"] if "content" in turn else (turn.get("slots") or {}).get("message")
    if not isinstance(text, str):
        raise PromptError(f"a turn of role {role!r} needs a text for 'message', got {text!r}")
    return Message(role, text)


def _inference(ids: list[int]) -> Prompt:
    array = np.asarray(ids, np.int32)
    return Prompt(input_ids=array, context_ids=array, prompt_ids=array)


def _training(
    ids: list[int], offsets: list[tuple[int, int]], found: Responses, prompt_ids: list[int]
) -> Prompt:
    """A prompt whose loss mask has the tokens that stand for characters of the responses."""
    array = np.asarray(ids, np.int32)
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(array), bool)
    is_last = mask
    for begin, end in found.spans:
        is_last = (ends > begin) & (begins < end)
        mask |= is_last
    split = int(np.argmax(is_last)) if is_last.any() else len(array)
    return Prompt(
        input_ids=array,
        context_ids=array[:split],
        prompt_ids=np.asarray(prompt_ids, np.int32),
        answer_ids=array[split:],
        mask=mask,
    )
