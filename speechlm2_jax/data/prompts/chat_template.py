"""A tokenizer's own chat template: renders dialogs, and finds what the model writes of them."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from speechlm2_jax.data.prompts import template_limits as limits
from speechlm2_jax.data.prompts.prompt import PromptError
from speechlm2_jax.data.prompts.template_sandbox import Refusal, environment, write
from speechlm2_jax.data.prompts.thinking import OUTPUT_ROLE, Message

MARK = "\ue000\ue001"
"""Stands for a response while its place is looked for: characters for private use, no spaces."""
_PER_TURN = 64
"""Characters that a turn counts beside its text, where limits grow with the dialog."""
log = logging.getLogger(__name__)
_OTHERS = "set prompt_format to another format"


class Rendered(NamedTuple):
    """What a template makes of a dialog."""

    text: str
    spans: list[tuple[int, int]]
    """First character and the one after the last of each `{% generation %}` block."""


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses in a rendered dialog whose last turn is the model's."""

    prompt: str
    """What generates the last turn, the generation prompt included."""
    spans: list[tuple[int, int]]
    """First character and the one after the last of each response, its end marker included."""


class ChatTemplate:
    """A Jinja chat template, run in a sandbox within limits (`template_limits`).

    Args:
        source: the template.
        name: of the tokenizer, for errors.
        special_tokens: `bos_token`, ...: texts that the template may write.
        added_tokens: the tokenizer's tokens that are never split; one of them ends a turn.

    Raises PromptError for a template that is no Jinja or too long.
    """

    def __init__(
        self,
        source: str,
        name: str,
        special_tokens: Mapping[str, str],
        added_tokens: Sequence[str] = (),
    ) -> None:
        self._where = f"the chat template of tokenizer {name}"
        self._special_tokens = dict(special_tokens)
        self._markers = [token for token in added_tokens if token.strip()]
        self.can_think = "enable_thinking" in source
        if len(source) > limits.MAX_SOURCE:
            raise PromptError(
                f"{self._where} has {len(source)} characters, at most {limits.MAX_SOURCE} are "
                f"supported; {_OTHERS}"
            )
        try:
            with limits.budget():
                self._template = environment().from_string(source)
            # each rendering copies them, which takes ten times as long of Jinja's ChainMap
            self._template.globals = dict(self._template.globals)
        except TemplateSyntaxError as error:
            raise PromptError(
                f"{self._where}, line {error.lineno}: {error.message}; {_OTHERS}"
            ) from error
        except Exception as error:
            raise self._problem(error) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
    ) -> Rendered:
        """Renders a dialog as `apply_chat_template` of transformers does.

        Raises PromptError, with the template's own words, for a dialog that it refuses.
        """
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        variables = {
            **self._special_tokens,
            **thinking,
            "messages": [{"role": role, "content": text} for role, text in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with limits.budget(sum(len(message.text) + _PER_TURN for message in messages)):
                return Rendered(*write(self._template, variables))
        except Refusal as error:
            raise PromptError(f"{self._where} refuses this dialog: {error.message}") from error
        except Exception as error:
            raise self._problem(error) from error

    def responses(
        self, messages: Sequence[Message], rendered: Rendered, known: "TemplateCache"
    ) -> Responses:
        """Finds the model's turns in a rendered dialog, the last of which is the last turn.

        A response is what follows the generation prompt, up to the end of its end marker. A
        response before the last one counts where the template writes it in the same way as a last
        one: templates that remove the thoughts of earlier turns do not. Where the template has
        `{% generation %}` blocks, they are the responses instead. The last one has its end marker
        in any case.

        Raises PromptError where a response neither follows the generation prompt nor is in a block.
        """
        spans = list(rendered.spans)
        for index, (role, _) in enumerate(messages[:-1]):
            if role == OUTPUT_ROLE and not rendered.spans:
                spans += self._earlier(messages, index, rendered.text, known)
        last = known.turn_after(tuple(messages[:-1]))
        if rendered.text.startswith(last.prompt):
            tail = last.tail if rendered.text.endswith(last.tail) else ""
            end = len(rendered.text) - len(tail) + self._marker_end(tail)
            begin = len(last.prompt)
            if not last.tail.strip():
                _warn_of_no_end(self._where)
            if spans and spans[-1][1] > begin:  # a block of the last response
                begin, end = min(begin, spans[-1][0]), max(end, spans.pop()[1])
            return Responses(prompt=last.prompt, spans=[*spans, (begin, end)])
        if spans:
            return Responses(prompt=last.prompt, spans=spans)
        begun = os.path.commonprefix([rendered.text, last.prompt])
        raise PromptError(
            f"{self._where} writes a response otherwise than its generation prompt begins it "
            f"({last.prompt[len(begun) :][:60]!r} is not written), so responses cannot be learnt; "
            f"{_OTHERS}"
        )

    def markers_in(self, text: str) -> list[str]:
        """The special tokens in a text."""
        return [token for token in self._markers if text and token in text]

    def _earlier(
        self, messages: Sequence[Message], index: int, text: str, known: "TemplateCache"
    ) -> list[tuple[int, int]]:
        """The span of a response that is not the last one, or nothing if it is not learnt."""
        turn = known.turn_after(tuple(messages[:index]))
        marked = [*messages[:index], Message(OUTPUT_ROLE, MARK), *messages[index + 1 :]]
        before, is_found, after = known.render(marked).text.partition(MARK)
        is_like_the_last = before == turn.prompt + turn.lead
        is_here = text.startswith(before) and text.endswith(after)
        if not (is_found and is_like_the_last and is_here):
            return []
        tail = os.path.commonprefix([after, turn.tail])
        if self.markers_in(turn.tail) and not self.markers_in(tail):
            tail = ""  # earlier turns end otherwise: half of a marker is none
        return [(len(turn.prompt), len(text) - len(after) + self._marker_end(tail))]

    def _marker_end(self, tail: str) -> int:
        """Where the end marker ends in what follows a response.

        That is the end of its last special token. The newline after it is not generated, because
        generation stops before. Without special tokens all of it is the end marker.
        """
        ends = [tail.rfind(token) + len(token) for token in self.markers_in(tail)]
        return max(ends, default=len(tail))

    def _problem(self, error: Exception) -> PromptError:
        words = error.message if isinstance(error, TemplateError) else None
        reason = " ".join((words or str(error) or type(error).__name__).split())[:300]
        return PromptError(f"{self._where} cannot be used: {reason}; {_OTHERS}")


@cache
def _warn_of_no_end(where: str) -> None:
    """Warns once per template."""
    log.warning(
        "%s writes nothing after a response, so a model does not learn to end it; if it goes on, "
        "set prompt_format to another format",
        where,
    )


class Opened(NamedTuple):
    """How a template writes a response after some turns."""

    prompt: str
    """All before it, with the generation prompt."""
    lead: str
    """What it writes between that and the response: an empty thought for example."""
    tail: str
    """What it writes after the response, if that is the last turn."""


class TemplateCache:
    """Renderings of the prompts of one call, which most dialogs of a data set have in common."""

    def __init__(self, template: ChatTemplate, enable_thinking: bool | None) -> None:
        self._template = template
        self._thinking = enable_thinking
        self._turns: dict[tuple[Message, ...], Opened] = {}

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Renders a dialog."""
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, enable_thinking=self._thinking
        )

    def turn_after(self, messages: tuple[Message, ...]) -> Opened:
        """How a response to these turns is written. Raises PromptError as `render` does."""
        if messages not in self._turns:
            prompt = self.render(messages, add_generation_prompt=True).text
            last = self.render([*messages, Message(OUTPUT_ROLE, MARK)]).text
            before, _, tail = last.partition(MARK)
            self._turns[messages] = Opened(prompt, before.removeprefix(prompt), tail)
        return self._turns[messages]
