"""What an index counts of the turns of conversations of two voices."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from speechlm2_jax.data.duplex.conversations import DuplexConversation, FrameGrid
from speechlm2_jax.data.index.counts import VERSION, Count
from speechlm2_jax.data.manifest_options import ManifestOptions

AGENT_TEXT, SPEAKERS = "agent_text", "speakers"
"""Columns: of each row, whether its agent has a text or is meant to have none; and lines of JSON
with the turns of each speaker, in bytes."""


@dataclass(frozen=True, kw_only=True)
class SpeakerCounts:
    """Counts the turns of speakers (implements `Counts`)."""

    grid: FrameGrid
    output_roles: tuple[str, ...]
    """Speakers that are the agent."""

    NAME: ClassVar[str] = "speakers"
    TYPES: ClassVar[Mapping[str, np.dtype]] = {AGENT_TEXT: np.dtype("u1"), SPEAKERS: np.dtype("u1")}

    def key(self, options: ManifestOptions) -> list[Any]:
        """What the columns depend on, beside the rows."""
        grid = self.grid
        return [VERSION, grid.frame_length_s, grid.sample_rate_hz, self.output_roles]

    def counter(self) -> Count:
        """What counts."""
        return self._columns

    def _columns(self, conversations: Sequence[DuplexConversation | None]) -> dict[str, np.ndarray]:
        has_text = [one is not None and self.agent_has_text(one) for one in conversations]
        found = Counter(turn.speaker for one in conversations if one for turn in one.turns)
        line = json.dumps(list(found.items())).encode() + b"\n" if found else b""
        return {
            AGENT_TEXT: np.asarray(has_text, self.TYPES[AGENT_TEXT]),
            SPEAKERS: np.frombuffer(line, self.TYPES[SPEAKERS]),
        }

    def agent_has_text(self, conversation: DuplexConversation) -> bool:
        """Whether the agent has a text within the conversation, or is meant to have none."""
        if conversation.is_meant_silent:
            return True
        frames = self.grid.frame(conversation.duration_s)
        turns = conversation.turns_of(frozenset(self.output_roles))
        return any(turn.text and self.grid.frame(turn.start_s) < frames for turn in turns)


def speakers_of(columns: Sequence[Mapping[str, np.ndarray]]) -> Counter[str | None]:
    """How many turns each speaker has, by the columns of all parts."""
    found: Counter[str | None] = Counter()
    for part in columns:
        for line in part[SPEAKERS].tobytes().splitlines():
            found.update(dict(json.loads(line)))
    return found
