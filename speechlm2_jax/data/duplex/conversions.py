"""Lhotse cuts of other layouts as conversations of two voices, as NeMo's parsers convert them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from speechlm2_jax.data.conversations import AudioClip, Conversation, silent_clip
from speechlm2_jax.data.duplex.conversations import DuplexConversation, SpokenTurn
from speechlm2_jax.data.lhotse_types import Cut
from speechlm2_jax.data.manifest_values import mapping, missing_key, moment, shown, text
from speechlm2_jax.settings import SettingsError

USER, AGENT = "user", "agent"
TARGET = "target_audio"
FIRST_FRAME_S = 0.08
"""How long the user of a continuation has the floor."""
AFTER_END_S = 1.0
"""How far the agent's turn goes beyond appended silence, so that its end is not written."""

Convert = Callable[[Cut, DuplexConversation], DuplexConversation | None]
"""What becomes of a cut; None leaves it out."""


@dataclass(frozen=True, kw_only=True)
class OverlapOptions:
    """Keys of `s2s_duplex_overlap_as_s2s_duplex`."""

    move_agent_text_back_by: float = 0.0
    """Seconds by which the agent's turns begin earlier."""
    filter_samples_starting_with_agent: bool = False
    """Leaves out conversations that the agent opens."""
    agent_roles: Sequence[str] = ("agent", "Assistant", "assistant")
    """Names of the agent, for leaving out; converted turns have `agent`."""


def overlapping(options: OverlapOptions) -> Convert:
    """Takes the turns of a cut from its fields `agent_segments` and `user_segments`."""

    def convert(cut: Cut, conversation: DuplexConversation) -> DuplexConversation | None:
        back_s = options.move_agent_text_back_by
        turns = [
            *(_segment(s, AGENT, back_s) for s in _segments(cut, "agent_segments")),
            *(_segment(s, USER, 0.0) for s in _segments(cut, "user_segments")),
        ]
        turns.sort(key=lambda turn: turn.start_s)
        if options.filter_samples_starting_with_agent and (
            not turns or turns[0].speaker in options.agent_roles
        ):
            return None
        return replace(conversation, turns=tuple(turns))

    return convert


def _segments(cut: Cut, key: str) -> list[Any]:
    custom = cut.custom or {}
    if not isinstance(custom.get(key), list):
        raise SettingsError(f"cut {cut.id!r}: {missing_key(custom, key)}")
    return custom[key]


def _segment(segment: object, speaker: str, back_s: float) -> SpokenTurn:
    row = mapping(segment, "a segment")
    return SpokenTurn(
        speaker=speaker,
        start_s=moment(row.get("start"), "start") - back_s,
        end_s=moment(row.get("end"), "end"),
        text=text(row.get("text") or "", "text"),
    )


@dataclass(frozen=True, kw_only=True)
class ReverseOptions:
    """Keys of `s2s_duplex_reverse_role`."""

    agent_roles: Sequence[str] = (AGENT, "assistant")
    """Speakers who become the user, in any letter case."""
    user_roles: Sequence[str] = (USER,)
    """Speakers who become the agent, in any letter case."""
    target_agent_name: str = AGENT
    target_user_name: str = USER


def reversed_roles(options: ReverseOptions) -> Convert:
    """Makes the agent of a conversation its user, recordings and turns, and the user its agent."""
    names = {role.lower(): options.target_user_name for role in options.agent_roles}
    names |= {role.lower(): options.target_agent_name for role in options.user_roles}

    def convert(cut: Cut, conversation: DuplexConversation) -> DuplexConversation:
        agent = cut.custom[TARGET]
        lasts_s = float(agent.duration) if not cut.start else conversation.duration_s
        user_s = min(conversation.duration_s, lasts_s)
        return replace(
            conversation,
            duration_s=lasts_s,
            sample_rate_hz=int(agent.sampling_rate),
            source=replace(conversation.target, duration_s=lasts_s),
            target=replace(conversation.source, duration_s=user_s),
            turns=tuple(
                replace(turn, speaker=names.get((turn.speaker or "").lower(), turn.speaker))
                for turn in conversation.turns
            ),
        )

    return convert


@dataclass(frozen=True, kw_only=True)
class ContinuationOptions:
    """Keys of `lhotse_magpietts_data_as_continuation`."""

    add_extra_end_silence: bool = False
    extra_end_silence_range: tuple[float, float] = (0.5, 6.0)
    """Seconds of silence behind the agent, drawn by the seed and the cut's id."""
    max_cer: float = 0.03
    """Greatest `cer` of the supervision."""
    min_context_speaker_similarity: float = 0.6
    """Least `context_speaker_similarity` of the supervision."""
    target_speaker: str | None = None
    """A part of the speaker's name."""
    sample_rate: int = 22050
    """Hertz that frames are counted by."""
    seed: int = 0


def continuation(cut: Cut, clip: AudioClip, options: ContinuationOptions) -> DuplexConversation:
    """A recording of speech synthesis as an agent beside a silent user, from the start on.

    Args:
        cut: its first supervision has the text.
        clip: its `target_audio`.
        options: silence behind it.
    """
    silence_s = 0.0
    if options.add_extra_end_silence:
        draws = random.Random(f"{options.seed} {cut.id}")  # noqa: S311
        silence_s = draws.uniform(*options.extra_end_silence_range)
    total_s = clip.duration_s + silence_s
    beyond_s = silence_s + AFTER_END_S if silence_s else 0.0
    return DuplexConversation(
        id=f"{cut.id}_source",  # as NeMo names it
        duration_s=total_s,
        sample_rate_hz=options.sample_rate,
        source=silent_clip(f"{cut.id}_source", total_s),
        target=replace(clip, duration_s=total_s, silence_s=silence_s),
        turns=(
            SpokenTurn(
                speaker=USER, start_s=0.0, end_s=FIRST_FRAME_S + silence_s, text="dummy text"
            ),
            SpokenTurn(
                speaker=AGENT,
                start_s=0.0,
                end_s=clip.duration_s - FIRST_FRAME_S + beyond_s,
                text=text(cut.supervisions[0].text, "text"),
            ),
        ),
    )


def continuation_fault(cut: Cut, options: ContinuationOptions) -> str | None:
    """Why settings leave a cut out; None if they do not."""
    if (cut.custom or {}).get("validation_status", "pass") != "pass":
        return "validation_status"
    if not cut.supervisions:
        return "no supervision"
    first = cut.supervisions[0]
    custom = first.custom or {}
    similarity = custom.get("context_speaker_similarity")
    if custom.get("cer") is not None and not custom["cer"] <= options.max_cer:
        return "max_cer"
    if similarity is not None and not similarity >= options.min_context_speaker_similarity:
        return "min_context_speaker_similarity"
    if options.target_speaker is not None and options.target_speaker not in (first.speaker or ""):
        return "target_speaker"
    return None


def with_silent_agent(
    conversation: Conversation, agent_silence_s: float, sample_rate_hz: int
) -> DuplexConversation:
    """A recording and its text as a user, and an agent who stays silent.

    Args:
        conversation: of one recording.
        agent_silence_s: seconds of silence behind the recording, the agent's turn; if negative, so
            much of its end is the agent's turn.
        sample_rate_hz: that frames are counted by.
    """
    if len(conversation.clips) != 1:
        raise SettingsError(f"{shown(conversation.id)}: expected one recording and its text")
    clip = conversation.clips[0]
    user_s, added_s = clip.duration_s, max(agent_silence_s, 0.0)
    start_s = user_s + min(agent_silence_s, 0.0)
    total_s = user_s + added_s
    agent_end_s = start_s + abs(agent_silence_s)
    return DuplexConversation(
        id=conversation.id,
        duration_s=total_s,
        sample_rate_hz=sample_rate_hz,
        source=replace(clip, duration_s=total_s, silence_s=added_s),
        target=silent_clip(f"{conversation.id}_target", total_s),
        turns=(
            SpokenTurn(speaker=USER, start_s=0.0, end_s=user_s, text=conversation.response or ""),
            SpokenTurn(speaker=AGENT, start_s=start_s, end_s=agent_end_s, text=""),
        ),
        where=conversation.where,
        task="asr",
        is_meant_silent=True,
    )
