"""Lhotse cuts of dialogs, a supervision for each turn, as conversations of text and recordings."""

from dataclasses import replace

from speechlm2_jax.data.conversations import AudioClip, AudioTurn, Conversation, TextTurn
from speechlm2_jax.data.duplex.conversations import clean_text
from speechlm2_jax.data.lhotse_types import Cut, Supervision
from speechlm2_jax.data.manifest_options import (
    ManifestOptions,
    SpeakerRoles,
    opening_turns,
)
from speechlm2_jax.data.manifest_values import moment, text


class UnknownSpeakerError(ValueError):
    """A dialog with a speaker who is neither the user nor the assistant."""


def dialog_of_cut(
    cut: Cut, clip: AudioClip, options: ManifestOptions, roles: SpeakerRoles, *, where: str
) -> Conversation:
    """A cut as a dialog: recordings of the user's turns, texts of the assistant's.

    Args:
        cut: its supervisions are the turns, in their order.
        clip: the recording of the whole cut.
        options: its tags and locator tag.
        roles: whose the supervisions are.
        where: the words that name the cut.

    Raises UnknownSpeakerError for a supervision of anyone else.
    """
    own = getattr(cut, "custom", None) or {}
    fields = options.all_fields(own)
    turns: list[TextTurn | AudioTurn] = [*opening_turns(fields)]
    for supervision in cut.supervisions:
        if supervision.speaker in roles.users:
            part = _part(cut, clip, supervision)
            turns.append(AudioTurn(role="user", clip=part, locator_tag=options.locator_tag))
        elif supervision.speaker in roles.assistants:
            response = text(supervision.text, "text")
            response = clean_text(response) if roles.strips_timestamps else response
            turns.append(TextTurn(role="assistant", text=response))
        else:
            raise UnknownSpeakerError(supervision.speaker)
    return Conversation(
        id=str(cut.id),
        turns=tuple(turns),
        token_equivalent_duration_s=options.token_equivalent_duration_s,
        fields=fields,
        where=where,
    )


def _part(cut: Cut, clip: AudioClip, supervision: Supervision) -> AudioClip:
    """The recording of one turn, no more than the cut has of it."""
    start_s = max(moment(supervision.start, "start"), 0.0)
    end_s = min(moment(supervision.end, "end"), clip.duration_s)
    duration_s = max(end_s - start_s, 0.0)
    name = str(supervision.id)
    if clip.cut is not None:
        part = cut.truncate(offset=start_s, duration=duration_s)
        return AudioClip(id=name, path="", duration_s=duration_s, cut=part)
    return replace(
        clip,
        id=name,
        offset_s=clip.offset_s + start_s,
        duration_s=duration_s,
        channel=_channel(cut, clip, supervision),
        is_segment=True,
    )


def _channel(cut: Cut, clip: AudioClip, supervision: Supervision) -> int | None:
    """Where a turn's own channel is in a file of several, of which the cut has several too."""
    channels = cut.recording.channel_ids
    own = supervision.channel
    if isinstance(cut.channel, int) or not isinstance(own, int) or own not in channels:
        return clip.channel
    return channels.index(own) if len(channels) > 1 else None
