"""From the turns of a dialog to token ids, by one of the formats of `formats.py`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from typing import Any

import numpy as np

from speechlm2_jax.data.prompts.formats import AUTO, FORMATS, OUTPUT_ROLE
from speechlm2_jax.data.prompts.prompt import Prompt, PromptError, PromptLengths, Turn
from speechlm2_jax.data.prompts.thinking import Message, ThoughtError
from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError

_SLOT = re.compile(r"(?<!<)\|(\w+)\|(?!>)")  # <|im_start|> is a token, not a field


@dataclass(frozen=True)
class _Segment:
    """A piece of the prompt that is tokenised on its own."""

    text: str
    has_bos: bool = False
    has_eos: bool = False
    is_response: bool = False


class FormatEncoder:
    """Encodes dialogs in one of FORMATS.

    Every turn is tokenised on its own, as in NeMo, so a tokenizer that marks the start of a text
    marks each turn's. Raises TokenizerError for a tokenizer that lacks tokens of the format.
    """

    end_ids: tuple[int, ...] = ()  # as in NeMo, the tokenizer's end token alone

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._format = FORMATS[name]
        templates = self._format.turns.values()
        self._needs_bos = self._format.insert_bos or any(t.startswith("|bos|") for t in templates)
        self._needs_eos = self._format.insert_eos or any(t.endswith("|eos|") for t in templates)
        self._check_tokens()
        self._known: set[str] = set()
        self._generation_prompts = {
            enabled: np.asarray(
                tokenizer.text_to_ids(text) if (text := self._generation_prompt(enabled)) else [],
                np.int32,
            )
            for enabled in (True, False)
        }

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that a turn may have."""
        return tuple(self._format.turns)

    @property
    def can_think(self) -> bool:
        """Whether responses may open with a thought, so that `enable_thinking` has an effect."""
        return self._format.thinking is not None

    def encode(
        self, dialogs: Sequence[Sequence[Turn]], enable_thinking: bool | None
    ) -> list[Prompt]:
        """Encodes many dialogs with one call of the tokenizer; thoughts are on by default."""
        return [self._assemble(*pair) for pair in self._encoded(dialogs, enable_thinking)]

    def lengths(
        self, dialogs: Sequence[Sequence[Turn]], placeholder_id: int
    ) -> list[PromptLengths]:
        """The lengths of what `encode` gives, in less time."""
        found: list[PromptLengths] = []
        rendered = self._rendered(dialogs, None)
        texts = [segment.text for dialog in rendered for segment in dialog]
        counts = iter(self.tokenizer.count(texts, placeholder_id))
        for dialog in rendered:
            last, own = dialog[-1], list(islice(counts, len(dialog)))
            each = [
                one.tokens + segment.has_bos + segment.has_eos
                for segment, one in zip(dialog, own, strict=True)
            ]
            each[-1] += self._format.insert_eos and last.is_response
            tokens = sum(each) + self._format.insert_bos
            found.append(
                PromptLengths(
                    tokens=tokens,
                    context=tokens - each[-1] if last.is_response else tokens,
                    placeholders=sum(one.found for one in own),
                    has_response=last.is_response,
                )
            )
        return found

    def _encoded(
        self, dialogs: Sequence[Sequence[Turn]], enable_thinking: bool | None
    ) -> Iterator[tuple[list[_Segment], list[list[int]]]]:
        """The pieces of each dialog, and their ids."""
        rendered = self._rendered(dialogs, enable_thinking)
        ids = iter(self.tokenizer.texts_to_ids([s.text for dialog in rendered for s in dialog]))
        return ((dialog, [next(ids) for _ in dialog]) for dialog in rendered)

    def _rendered(
        self, dialogs: Sequence[Sequence[Turn]], enable_thinking: bool | None
    ) -> list[list[_Segment]]:
        may_think = enable_thinking is not False
        return [list(self._segments(turns, may_think)) for turns in dialogs]

    def dialog(self, turns: list[Turn]) -> list[Turn]:
        """Puts a system turn where the format wants it: its own, or the first user turn (llama2).

        Raises PromptError where it has no place for one.
        """
        if not turns or turns[0]["role"] != "system" or "system" in self._format.turns:
            return turns
        if "system_and_user" not in self._format.turns:
            raise PromptError(
                f"prompt format {self.name!r} has no place for a system prompt; remove it, or use "
                f"one of {', '.join(n for n, f in FORMATS.items() if _takes_system(f.turns))}"
            )
        if len(turns) < 2 or turns[1]["role"] != "user":
            raise PromptError("a system prompt must be followed by a user turn")
        system, user, *rest = turns
        slots = {"system": system["slots"]["message"], **user["slots"]}
        return [{"role": "system_and_user", "slots": slots}, *rest]

    def _check_tokens(self) -> None:
        for token in self._format.tokens:
            if not _is_token(token, self.tokenizer):
                raise TokenizerError(
                    f"prompt format {self.name!r} needs the token {token!r}, which tokenizer "
                    f"{self.tokenizer.name} lacks and would split into "
                    f"{len(self.tokenizer.text_to_ids(token))}; set prompt_format to "
                    f"{_fitting(self.tokenizer)}"
                )
        for needed, found, kind in (
            (self._needs_bos, self.tokenizer.bos_id, "begin"),
            (self._needs_eos, self.tokenizer.eos_id, "end"),
        ):
            if needed and found is None:
                raise TokenizerError(
                    f"prompt format {self.name!r} needs a {kind}-of-sequence token, which "
                    f"tokenizer {self.tokenizer.name} lacks"
                )

    def _generation_prompt(self, enable_thinking: bool) -> str | None:
        """The generation prompt."""
        prefix, thinking = self._format.inference_prefix, self._format.thinking
        return prefix if not prefix or not thinking else prefix + thinking.opening(enable_thinking)

    def _with_thoughts(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """The turns as a thinking format writes them."""
        thinking = self._format.thinking
        if thinking is None:
            return turns
        for turn in turns:
            self._render(turn)  # roles and fields are checked first
        messages = [
            Message(str(t["role"]), t["content"] if "content" in t else t["slots"]["message"])
            for t in turns
        ]
        try:
            return [
                {"role": role, "slots": {"message": text}}
                for role, text in thinking.rewrite(messages)
            ]
        except ThoughtError as error:
            raise PromptError(f"prompt format {self.name!r}: {error}") from error

    def _segments(self, turns: Sequence[Turn], enable_thinking: bool) -> Iterator[_Segment]:
        if not turns:
            raise PromptError("an empty dialog cannot be encoded")
        turns = self._with_thoughts(turns)
        preamble = self._format.turns.get("preamble")
        if preamble is not None and turns[0].get("role") != "preamble":
            yield _Segment(preamble)
        for index, turn in enumerate(turns):
            if turn.get("role") == "preamble" and index:
                raise PromptError("a preamble may only open the dialog")
            segment = self._render(turn)
            is_last = index == len(turns) - 1
            is_learnt = is_last or not self.can_think
            yield segment if is_learnt else replace(segment, is_response=False)
        generation_prompt = self._generation_prompt(enable_thinking)
        if turns[-1]["role"] != OUTPUT_ROLE and generation_prompt is not None:
            yield _Segment(generation_prompt)

    def _render(self, turn: Turn) -> _Segment:
        role = str(turn.get("role"))
        if role not in self._format.turns:
            raise PromptError(
                f"prompt format {self.name!r} has no role {role!r}; roles: {', '.join(self.roles)}"
            )
        template = self._format.turns[role]
        texts, names = _slots(template.removeprefix("|bos|").removesuffix("|eos|"))
        values = self._values(role, turn, names)
        pairs = zip(names, texts[1:], strict=True)
        filled = (part for name, text in pairs for part in (values[name], text))
        return _Segment(
            "".join([texts[0], *filled]),
            has_bos=template.startswith("|bos|"),
            has_eos=template.endswith("|eos|"),
            is_response=role == OUTPUT_ROLE,
        )

    def _values(self, role: str, turn: Turn, names: Sequence[str]) -> Mapping[str, str]:
        """The text of each field of a turn. Raises PromptError for a missing or wrong value."""
        if "content" in turn and len(names) == 1:
            given = {names[0]: turn["content"]}
        else:
            slots: Mapping[str, Any] = turn.get("slots") or {}
            given = {self._format.renamed.get(k, k): v for k, v in slots.items()} | dict(slots)
        values: dict[str, str] = {}
        for name in names:
            value, written_as = given.get(name), self._format.fields.get(name)
            if not isinstance(value, str):
                raise PromptError(
                    f"a turn of role {role!r} needs a text for {name!r}, got {value!r}"
                )
            try:
                values[name] = value if written_as is None else written_as(value)
            except ValueError as error:
                raise PromptError(
                    f"a turn of role {role!r} needs for {name!r} {error}; got {value!r}"
                ) from error
            if written_as is not None and values[name].startswith("<|"):
                self._check_token(values[name], f"{name}={value!r}")
        return values

    def _check_token(self, token: str, why: str) -> None:
        """Raises PromptError for a token that a field becomes and the tokenizer lacks."""
        if token not in self._known:
            if not _is_token(token, self.tokenizer):
                raise PromptError(
                    f"prompt format {self.name!r}: {why} needs the token {token!r}, which "
                    f"tokenizer {self.tokenizer.name} lacks"
                )
            self._known.add(token)

    def _assemble(self, dialog: Sequence[_Segment], encoded: Sequence[list[int]]) -> Prompt:
        pieces, is_response = [], []
        if self._format.insert_bos:
            pieces.append([self.tokenizer.bos_id])
            is_response.append(False)
        for segment, ids in zip(dialog, encoded, strict=True):
            bos = [self.tokenizer.bos_id] if segment.has_bos else []
            eos = [self.tokenizer.eos_id] if segment.has_eos else []
            pieces.append([*bos, *ids, *eos])
            is_response.append(segment.is_response)
        if self._format.insert_eos and is_response[-1]:
            pieces[-1].append(self.tokenizer.eos_id)
        input_ids = np.asarray(list(chain.from_iterable(pieces)), np.int32)
        if not is_response[-1]:
            return Prompt(input_ids=input_ids, context_ids=input_ids, prompt_ids=input_ids)
        split = len(input_ids) - len(pieces[-1])
        thinking = self._format.thinking
        may_think = thinking is None or thinking.is_thoughtful(dialog[-1].text)
        return Prompt(
            input_ids=input_ids,
            context_ids=input_ids[:split],
            prompt_ids=np.concatenate([input_ids[:split], self._generation_prompts[may_think]]),
            answer_ids=input_ids[split:],
            mask=np.repeat(is_response, [len(p) for p in pieces]),
        )


@cache
def _slots(body: str) -> tuple[list[str], list[str]]:
    """The texts around the fields of a turn's template, and the names of the fields."""
    parts = _SLOT.split(body)
    return parts[::2], parts[1::2]


def _is_token(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text becomes one token, and that alone."""
    ids = tokenizer.text_to_ids(text)
    return len(ids) == 1 and tokenizer.ids_to_tokens(ids) == [text]


def _fitting(tokenizer: Tokenizer) -> str:
    """The formats whose tokens a tokenizer has."""
    fitting = [n for n, f in FORMATS.items() if all(_is_token(t, tokenizer) for t in f.tokens)]
    own = f"{AUTO} (the tokenizer's own chat template), or to " if tokenizer.chat_template else ""
    return f"{own}one whose tokens it has: {', '.join(fitting)}"


def _takes_system(turns: Mapping[str, str]) -> bool:
    return "system" in turns or "system_and_user" in turns
