"""Conversations as inputs of an evaluation: the turns before the response are the prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.conversations import AudioClip, AudioTurn, Conversation, TextTurn
from speechlm2_jax.data.prompts import OUTPUT_ROLE


@dataclass(frozen=True, kw_only=True)
class EvaluatedDialog:
    """A conversation without its last response, which the model gives."""

    turns: tuple[TextTurn | AudioTurn, ...]
    fields: dict[str, Any]
    """Other fields of its manifest row."""
    process: Callable[[np.ndarray, int, int], np.ndarray] | None = field(
        default=None, repr=False, compare=False
    )
    """(samples, sampling rate in Hz, number) of each recording -> the samples that are used."""

    @property
    def clips(self) -> tuple[AudioClip, ...]:
        """Its recordings, in order; there may be none."""
        return tuple(turn.clip for turn in self.turns if isinstance(turn, AudioTurn))

    def read(self, rate_hz: int) -> tuple[Float[np.ndarray, " S"], ...]:
        """The samples of each recording. Raises AudioError."""
        waves = [clip.load(rate_hz) for clip in self.clips]
        if self.process is not None:
            waves = [self.process(wave, rate_hz, number) for number, wave in enumerate(waves)]
        return tuple(waves)

    def messages(self, locator_tag: str) -> list[tuple[str, str]]:
        """(role, text) of each turn, with the model's locator tag for audio."""
        return [(t.role, t.text if isinstance(t, TextTurn) else locator_tag) for t in self.turns]

    def with_response(self, text: str) -> dict[str, Any]:
        """The whole conversation with the model's turn, as NeMo's salm_generate writes it."""
        response = TextTurn(role=OUTPUT_ROLE, text=text)
        turns = [_plain(turn) for turn in (*self.turns, response)]
        return {"conversations": turns, **({"custom": self.fields} if self.fields else {})}


def evaluated_dialog(conversation: Conversation) -> EvaluatedDialog:
    """A conversation without the model's turns at its end."""
    turns = list(conversation.turns)
    while turns and turns[-1].role == OUTPUT_ROLE:
        turns.pop()
    return EvaluatedDialog(turns=tuple(turns), fields=dict(conversation.fields))


def joined(recordings: Sequence[Float[np.ndarray, " _"]]) -> Float[np.ndarray, " S"]:
    """All recordings of a dialog, one after another."""
    return np.concatenate([np.zeros(0, np.float32), *recordings])


def _plain(turn: TextTurn | AudioTurn) -> dict[str, Any]:
    """A turn as a line of a conversation has it (NeMo's `to_dict`)."""
    role = turn.role.title()
    if isinstance(turn, TextTurn):
        return {"type": "text", "from": role, "value": turn.text}
    clip = turn.clip
    place = {"duration": clip.duration_s, "offset": clip.offset_s}
    return {"type": "audio", "from": role, **place, "value": clip.path}
