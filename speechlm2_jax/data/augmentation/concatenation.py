"""Joins the short conversations of a batch into longer ones, as Lhotse's CutConcatenate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from speechlm2_jax.data.augmentation.effects import Wave
from speechlm2_jax.data.augmentation.loudness import at_loudness
from speechlm2_jax.data.conversations import AudioTurn, Conversation, TextTurn


@dataclass(frozen=True, kw_only=True)
class Concatenation:
    """How the conversations of one group are joined."""

    gap_s: float
    """Silence between two recordings."""
    duration_factor: float
    """A joined recording lasts at most so many times the longest of the group."""
    loudness_lufs: float | None
    """Of each recording before they are joined; None: as it is."""

    def joins(self, lengths: Sequence[int], rate_hz: int, most: int) -> list[list[int]]:
        """Which recordings of so many samples are joined, to at most `most`, in their order.

        From long to short: each takes the shortest that is left, while that fits.
        """
        gap = round(self.gap_s * rate_hz)
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        joined, used, taker = [[n] for n in order], [lengths[n] for n in order], 0
        while taker < len(joined) - 1:
            if used[taker] + gap + used[-1] <= most:
                used[taker] += gap + used.pop()
                joined[taker] += joined.pop()
            else:
                taker += 1
        return joined

    def sound(self, waves: Sequence[Wave], rate_hz: int) -> Wave:
        """One recording of several, silence between them."""
        gap = np.zeros(round(self.gap_s * rate_hz), np.float32)
        level = self.loudness_lufs
        if level is not None:
            waves = [at_loudness(wave, rate_hz, level) for wave in waves]
        return np.concatenate([part for wave in waves for part in (gap, wave)][1:])


def joined_conversation(conversations: Sequence[Conversation]) -> Conversation:
    """One conversation of several of one `context`: the first, with the responses of all."""
    first = conversations[0]
    response = " ".join(one.response for one in conversations if one.response)
    return replace(
        first,
        id="+".join(one.id for one in conversations),
        turns=(*first.turns[:-1], TextTurn(role=first.turns[-1].role, text=response)),
        prompt=None,
    )


def context(conversation: Conversation) -> tuple[tuple[str, str], ...] | None:
    """Roles and texts before the response, with the tag that stands for the recording.

    Conversations of the same context can be joined; None of those that cannot be.
    """
    if len(conversation.clips) != 1 or conversation.response is None:
        return None
    return tuple(
        (turn.role, turn.locator_tag if isinstance(turn, AudioTurn) else turn.text)
        for turn in conversation.turns[:-1]
    )
