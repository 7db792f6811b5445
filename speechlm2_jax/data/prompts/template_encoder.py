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
from speechlm2_jax.data.prompts.prompt import Prompt, PromptError, PromptLengths, Turn
from speechlm2_jax.data.prompts.template_sandbox import NOW
from speechlm2_jax.data.prompts.thinking import OUTPUT_ROLE, Message
from speechlm2_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", OUTPUT_ROLE)


class TemplateEncoder:
    """Encodes dialogs as the tokenizer's chat template writes them.

    The text of a whole dialog is tokenised at once, so its ids are those of `apply_chat_template`.
    A dialog of a lone response, as plain text is, is that text between the template's first and
    last special token: no template writes it without a prompt.
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
        first = self._template.render([Message("user", "?")], add_generation_prompt=True)
        begin = tokenizer.special_tokens.get("bos_token") or "\0"
        self._begin_ids = (tokenizer.bos_id,) if first.text.startswith(begin) else ()
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
        is_text = [len(turns) == 1 and _message(turns[0]).role == OUTPUT_ROLE for turns in dialogs]
        others = [turns for turns, alone in zip(dialogs, is_text, strict=True) if not alone]
        encoded = iter(context.run(self._encode, others, enable_thinking))
        texts = [
            _message(turns[0]).text for turns, alone in zip(dialogs, is_text, strict=True) if alone
        ]
        plain = iter(self._plain(texts))
        return [next(plain) if alone else next(encoded) for alone in is_text]

    def _plain(self, texts: Sequence[str]) -> list[Prompt]:
        """Texts without a prompt, learnt as a whole."""
        end = self.end_ids[:1] or (self._tokenizer.eos_id,)
        end = () if end == (None,) else end
        begin = np.asarray(self._begin_ids, np.int32)
        found: list[Prompt] = []
        for ids in self._tokenizer.texts_to_ids(texts) if texts else ():
            response = np.asarray([*ids, *end], np.int32)
            array = np.concatenate([begin, response])
            mask = np.arange(len(array)) >= len(begin)
            found.append(
                Prompt(
                    input_ids=array,
                    context_ids=begin,
                    prompt_ids=begin,
                    answer_ids=response,
                    mask=mask,
                )
            )
        return found

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

    def lengths(
        self, dialogs: Sequence[Sequence[Turn]], placeholder_id: int
    ) -> list[PromptLengths]:
        """The lengths of what `encode` gives, in less time."""
        context = copy_context()
        context.run(NOW.set, datetime.now())
        return context.run(self._lengths, dialogs, placeholder_id)

    def _lengths(
        self, dialogs: Sequence[Sequence[Turn]], placeholder_id: int
    ) -> list[PromptLengths]:
        cache = TemplateCache(self._template, None)
        written = [self._write(turns, cache) for turns in dialogs]
        # a dialog without a response is all context
        spans = [found.spans[-1] if found else (len(r.text), len(r.text)) for r, found in written]
        counts = self._tokenizer.count([r.text for r, _ in written], placeholder_id, spans)
        return [
            PromptLengths(
                tokens=one.tokens,
                context=one.place if found else one.tokens,
                placeholders=one.found,
                has_response=found is not None,
            )
            for (_, found), one in zip(written, counts, strict=True)
        ]

    def _write(
        self, turns: Sequence[Turn], cache: TemplateCache
    ) -> tuple[Rendered, Responses | None]:
        """The text of a dialog, and its responses if the last turn is the model's."""
        if not turns:
            raise PromptError("an empty dialog cannot be encoded")
        messages = [_message(turn) for turn in turns]
        is_response = messages[-1].role == OUTPUT_ROLE
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
