"""From the turns of a dialog to token ids, by one of the formats of `formats.py`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from speechlm2_jax.data.prompts.formats import FORMATS, OUTPUT_ROLE
from speechlm2_jax.data.prompts.thinking import Message, ThoughtError
from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError
from speechlm2_jax.settings import SettingsError

_SLOT = re.compile(r"(?<!<)\|(\w+)\|(?!>)")  # <|im_start|> is a token, not a field

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


@dataclass(frozen=True)
class _Segment:
    """A piece of the prompt that is tokenised on its own."""

    text: str
    has_bos: bool = False
    has_eos: bool = False
    is_response: bool = False


class PromptFormatter:
    """Encodes dialogs in one format with one tokenizer.

    Args:
        name: a key of FORMATS.
        tokenizer: it must have the tokens that the format is written with.

    Raises PromptError for an unknown format and TokenizerError for a missing token.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        if name not in FORMATS:
            raise PromptError(f"unknown prompt format {name!r}; known: {', '.join(FORMATS)}")
        self.name = name
        self.tokenizer = tokenizer
        self._format = FORMATS[name]
        templates = self._format.turns.values()
        self._needs_bos = self._format.insert_bos or any(t.startswith("|bos|") for t in templates)
        self._needs_eos = self._format.insert_eos or any(t.endswith("|eos|") for t in templates)
        self._check_tokens()
        self._generation_prompts = {
            enabled: tokenizer.text_to_ids(text)
            if (text := self._generation_prompt(enabled))
            else []
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

    def encode_dialog(self, turns: Sequence[Turn], *, enable_thinking: bool = True) -> Prompt:
        """Encodes one dialog; one whose last turn is the user's ends with the generation prompt.

        Every turn is tokenised on its own, so a tokenizer that marks the start of a text marks
        each turn's. Without `enable_thinking`, a thinking format puts an empty thought before the
        response. Raises PromptError for an empty dialog, an unknown role or a missing field.
        """
        return self.encode_dialogs([turns], enable_thinking=enable_thinking)[0]

    def encode_dialogs(
        self, dialogs: Sequence[Sequence[Turn]], *, enable_thinking: bool = True
    ) -> list[Prompt]:
        """Encodes many dialogs with one call of the tokenizer."""
        rendered = [list(self._segments(turns, enable_thinking)) for turns in dialogs]
        ids = iter(self.tokenizer.texts_to_ids([s.text for dialog in rendered for s in dialog]))
        return [self._assemble(dialog, [next(ids) for _ in dialog]) for dialog in rendered]

    def dialog(self, messages: Sequence[tuple[str, str]]) -> list[Turn]:
        """Makes turns of (role, text): runs of one role are joined by a space.

        A system text goes to the format's system turn, or into its first user turn where the
        format has a place for it there (llama2). Raises PromptError where it has none.
        """
        runs = groupby(messages, key=lambda message: message[0])
        turns: list[Turn] = [
            {"role": role, "slots": {"message": " ".join(text for _, text in run)}}
            for role, run in runs
        ]
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
            self.tokenizer.require(token, f"prompt format {self.name!r}")
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
            yield replace(
                segment, is_response=segment.is_response and (is_last or not self.can_think)
            )
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
        body = template.removeprefix("|bos|").removesuffix("|eos|")
        names = _SLOT.findall(body)
        if "content" in turn and len(names) == 1:
            values: Mapping[str, Any] = {names[0]: turn["content"]}
        else:
            values = turn.get("slots") or {}
        for name in names:
            if not isinstance(values.get(name), str):
                raise PromptError(
                    f"a turn of role {role!r} needs a text for {name!r}, got {values.get(name)!r}"
                )
        return _Segment(
            _SLOT.sub(lambda match: values[match[1]], body),
            has_bos=template.startswith("|bos|"),
            has_eos=template.endswith("|eos|"),
            is_response=role == OUTPUT_ROLE,
        )

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
        input_ids = np.concatenate([np.asarray(p, np.int32) for p in pieces])
        if not is_response[-1]:
            return Prompt(input_ids=input_ids, context_ids=input_ids, prompt_ids=input_ids)
        split = len(input_ids) - len(pieces[-1])
        thinking = self._format.thinking
        may_think = thinking is None or thinking.is_thoughtful(dialog[-1].text)
        return Prompt(
            input_ids=input_ids,
            context_ids=input_ids[:split],
            prompt_ids=np.asarray(
                [*input_ids[:split], *self._generation_prompts[may_think]], np.int32
            ),
            answer_ids=input_ids[split:],
            mask=np.repeat(np.asarray(is_response), [len(p) for p in pieces]),
        )


def _takes_system(turns: Mapping[str, str]) -> bool:
    return "system" in turns or "system_and_user" in turns
