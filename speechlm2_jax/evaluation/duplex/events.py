"""The two channels of a generated conversation, for the scores of Full-Duplex-Bench."""

import numpy as np

from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.evaluation.duplex.inputs import Dialogue
from speechlm2_jax.evaluation.duplex.scoring import FIRST_TOKEN_FRAME, DuplexResponse, DuplexScorer
from speechlm2_jax.evaluation.duplex.turns import TranscribedTurn
from speechlm2_jax.evaluation.metrics.full_duplex import (
    AgentChannel,
    FullDuplexCounts,
    UserChannel,
    audible,
    count_events,
)

PAUSE, BACK_CHANNEL, INTERRUPTION = "pause", "back_channel", "interruption"
NEAR_S = 0.08
"""Between the start of an interruption and that of the turn that is meant."""


def user_channel(conversation: DuplexConversation, roles: tuple[str, ...]) -> UserChannel:
    """The user's turns, and the events that its manifest names."""
    turns = [(turn.start_s, turn.end_s) for turn in conversation.turns_of(frozenset(roles))]
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for event in conversation.events:
        by_kind.setdefault(event.kind, []).append((event.start_s, event.end_s))
    begins = np.array([start for start, _ in by_kind.get(INTERRUPTION, ())])
    return UserChannel(
        turns=turns,
        pauses=by_kind.get(PAUSE, ()),
        back_channels=by_kind.get(BACK_CHANNEL, ()),
        interruptions=[turn for turn in turns if (np.abs(begins - turn[0]) <= NEAR_S).any()],
    )


def agent_channel(
    scorer: DuplexScorer, response: DuplexResponse, turns: tuple[TranscribedTurn, ...]
) -> AgentChannel:
    """What was generated; without audio the turns of the text are taken for speech."""
    model = scorer.model
    _, text = scorer.turns_of(response)
    speech = text
    if len(response.audio):
        delay_s = FIRST_TOKEN_FRAME * model.token_equivalent_duration
        speech = audible(response.audio, model.target_sampling_rate, delay_s)
    words = [word.start_s for turn in turns for word in turn.words]
    return AgentChannel(speech=speech, turns=text, words=np.array(sorted(words), np.float64))


def events_of(
    scorer: DuplexScorer,
    dialogue: Dialogue,
    response: DuplexResponse,
    turns: tuple[TranscribedTurn, ...],
    roles: tuple[str, ...],
) -> FullDuplexCounts | None:
    """Counts the events of a conversation; None of a recording without a reference.

    Args:
        scorer: of the model.
        dialogue: the input.
        response: what was generated for it.
        turns: those of its text channel.
        roles: speakers that are the user.
    """
    if not isinstance(dialogue.source, DuplexConversation):
        return None
    return count_events(
        user_channel(dialogue.source, roles), agent_channel(scorer, response, turns)
    )
