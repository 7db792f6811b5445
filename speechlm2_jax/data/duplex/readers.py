"""Lhotse cuts and SHAR as conversations of two voices. Lhotse is imported only where it reads.

A cut is the user's recording; its field `target_audio` is the agent's, alongside in time. Either
may be mixed of several recordings: a MixedCut, in whose first track's `custom` the agent's is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.cuts import clip_of_cut, read_cuts
from speechlm2_jax.data.duplex.conversations import DialogEvent, DuplexConversation, SpokenTurn
from speechlm2_jax.data.duplex.conversions import TARGET
from speechlm2_jax.data.input_config import SharPath
from speechlm2_jax.data.lhotse_types import Cut, Recording
from speechlm2_jax.data.manifest_values import located, mapping, moment, seconds, text
from speechlm2_jax.data.shar import RECORDING, SharCut, shar_cuts
from speechlm2_jax.settings import SettingsError

EVENTS = "events"
"""Custom field of a cut: a list of {kind, start, end}, for evaluation (`DialogEvent`)."""

SYSTEM_PROMPT, TASK = "system_prompt", "task"
"""Custom fields of a cut, for speech-to-text models."""


def duplex_cuts(
    shar: SharPath | Path | None, manifests: Sequence[str | Path], fields: tuple[str, ...]
) -> Iterator[SharCut]:
    """The cuts of SHAR, or else of manifests.

    SHAR is one folder or several, or the files of each field; a recording that is not packed is
    read from the path in its manifest. Raises SettingsError for a missing file, and for lines that
    are no cuts.

    Args:
        shar: where SHAR is; None: the manifests are read.
        manifests: their paths.
        fields: `recording` and `target_audio`, as far as they are needed.
    """
    if shar is not None:
        yield from shar_cuts(shar, fields)
        return
    for path in manifests:
        for where, cut in read_cuts(path, fields=fields):
            yield SharCut(cut=cut, where=where)


def read_duplex(
    shar: SharPath | Path | None, manifests: Sequence[str | Path] = ()
) -> Iterator[DuplexConversation]:
    """The conversations of SHAR, or else of manifests of Lhotse cuts.

    Raises SettingsError as `duplex_cuts`, and for a cut without `target_audio`, naming it.
    """
    for one in duplex_cuts(shar, manifests, (RECORDING, TARGET)):
        with located(one.where):
            made = conversation_of_cut(one, None)
        yield replace(made, where=one.where, shard=one.shard)


def conversation_of_cut(
    one: SharCut, channel: int | None, *, has_agent: bool = True
) -> DuplexConversation:
    """A cut whose recordings are packed, or in files of their own.

    Without `has_agent` the agent's recording is neither needed nor read: the user's is in its
    place.
    """
    cut = one.cut
    if not one.packed:
        return duplex_conversation(cut, channel, has_agent=has_agent)
    if has_agent:
        _recording_of_agent(cut)
    users_channel = _one_of(cut.recording, cut.channel, channel)
    users = one.packed[0]
    user = users.clip(cut, cut.recording, channel=users_channel, number=one.number)
    user = user or clip_of_cut(cut, channel)
    return _conversation(cut, source=user, target=agent_clip(one) if has_agent else user)


def agent_clip(one: SharCut) -> AudioClip:
    """The agent's recording alongside a cut, packed as its last field or in a file."""
    cut, target = one.cut, _agent(one.cut)
    channel = _one_of(target, _chosen(cut, target), None)
    packed = one.packed[-1] if one.packed else None
    clip = packed and packed.clip(cut, target, channel=channel, number=one.number)
    return clip or _clip_of_agent(cut, target)


def duplex_conversation(
    cut: Cut, channel: int | None = None, *, has_agent: bool = True
) -> DuplexConversation:
    """A Lhotse cut that has `target_audio`; raises SettingsError, naming it, for another.

    Args:
        cut: the user's recording; transformed and in-memory ones are left to Lhotse to load.
        channel: the user's, of a recording with several where the cut names none; None: the mean.
        has_agent: as in `conversation_of_cut`.
    """
    if not has_agent:
        source = clip_of_cut(cut, channel)
        return _conversation(cut, source=source, target=source)
    target = _recording_of_agent(cut)
    source = clip_of_cut(cut, channel)
    return _conversation(cut, source=source, target=_clip_of_agent(cut, target))


def _clip_of_agent(cut: Cut, target: Any) -> AudioClip:
    """The stretch of the agent's recording that lies alongside a cut; all of one that is a cut."""
    from lhotse import MonoCut, MultiCut

    if hasattr(target, "supervisions"):
        return clip_of_cut(target, None)
    chosen = _chosen(cut, target)
    is_aligned = not cut.custom.get(f"{TARGET}_unaligned", False)
    stretch = {
        "id": cut.id,
        "start": float(cut.start) if is_aligned else 0.0,
        "duration": cut.duration,
        "recording": target,
    }
    agent: Any = (
        MonoCut(**stretch, channel=target.channel_ids[0] if chosen is None else chosen)
        if chosen is not None or target.num_channels == 1
        else MultiCut(**stretch, channel=target.channel_ids)
    )
    return clip_of_cut(agent, None)


def _conversation(cut: Cut, *, source: AudioClip, target: AudioClip) -> DuplexConversation:
    return DuplexConversation(
        id=cut.id,
        duration_s=seconds(cut.duration, "duration"),
        sample_rate_hz=int(cut.sampling_rate),
        source=source,
        target=target,
        turns=tuple(
            SpokenTurn(
                speaker=None if supervision.speaker is None else str(supervision.speaker),
                start_s=moment(supervision.start, "start"),
                end_s=moment(supervision.end, "end"),
                text=text(supervision.text or "", "text"),
            )
            for supervision in _supervisions(cut)
        ),
        events=tuple(_event(event) for event in _custom(cut).get(EVENTS) or ()),
        system_prompt=text(_custom(cut).get(SYSTEM_PROMPT) or "", SYSTEM_PROMPT),
        task=text(_custom(cut).get(TASK) or "", TASK),
    )


def _supervisions(cut: Cut) -> Sequence[Any]:
    """Those of the cut, and of an agent who is a cut too, by time."""
    if not hasattr(cut, "tracks"):
        return cut.supervisions
    agent = _custom(cut).get(TARGET)
    both = (*cut.supervisions, *getattr(agent, "supervisions", ()))
    return sorted(both, key=lambda supervision: moment(supervision.start, "start"))


def _event(value: object) -> DialogEvent:
    row = mapping(value, EVENTS)
    return DialogEvent(
        kind=text(row.get("kind"), "kind"),
        start_s=moment(row.get("start"), "start"),
        end_s=moment(row.get("end"), "end"),
    )


def _custom(cut: Cut) -> dict[str, Any]:
    """The fields of a cut; of a mixed one those of its first track."""
    tracks: Any = getattr(cut, "tracks", None)
    return (tracks[0].cut if tracks else cut).custom or {}


def _recording_of_agent(cut: Cut) -> Any:
    if not hasattr(cut, "tracks") and cut.recording is None:
        raise SettingsError(f"cut {cut.id!r} has no recording: the user's audio")
    return _agent(cut)


def _agent(cut: Cut) -> Any:
    """The agent's Recording; beside a mixed cut a cut."""
    from lhotse import Recording
    from lhotse.cut import Cut as LhotseCut

    target = _custom(cut).get(TARGET)
    if hasattr(cut, "tracks"):
        if isinstance(target, LhotseCut):
            return target
        raise SettingsError(
            f"cut {cut.id!r} is mixed of several: put its {TARGET}, as a cut, into the custom "
            "fields of its first track, or write both to files of their own"
        )
    if not isinstance(target, Recording):
        raise SettingsError(
            f"cut {cut.id!r} has no {TARGET}: a duplex model learns from two recordings, the "
            f"user's (the cut's own) and the agent's (cut.{TARGET} = a Lhotse Recording)"
        )
    return target


def _chosen(cut: Cut, target: Recording) -> int | None:
    """The channel of the agent's recording, where the cut names one."""
    channel = cut.custom.get(f"{TARGET}_channel_selector")
    if channel is not None and channel not in target.channel_ids:
        raise SettingsError(
            f"cut {cut.id!r}: {TARGET}_channel_selector is {channel!r}, and the recording has the "
            f"channels {list(target.channel_ids)}"
        )
    return channel


def _one_of(recording: Recording, named: object, setting: int | None) -> int | None:
    """Where a channel lies in the packed file of a recording; None for the mean of all."""
    if isinstance(named, int):
        return recording.channel_ids.index(named) if recording.num_channels > 1 else None
    return setting
