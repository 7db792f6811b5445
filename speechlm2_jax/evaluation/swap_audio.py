"""Swaps audio between utterances: a model that uses the audio now gets every text wrong."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from speechlm2_jax.data.conversations import AudioTurn
from speechlm2_jax.evaluation.dialogs import EvaluatedDialog, joined
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.metrics.wer import Normalizer
from speechlm2_jax.settings import SettingsError

MOST_TRIALS = 200
"""Rotations that are tried so that no utterance gets its own recording from another row."""


def is_swappable(utterance: Utterance) -> bool:
    """Whether it is one recording, or a conversation with one."""
    return utterance.dialog is None or len(utterance.dialog.clips) == 1


def swap_audio(utterances: Sequence[Utterance], normalize: Normalizer) -> list[Utterance]:
    """Gives every utterance that has a reference the audio of one with another reference.

    The swap is deterministic and uses each recording once. Rows that share a recording do not swap
    it among themselves, if that can be avoided. A conversation keeps its turns and gets the
    recording of another conversation. Utterances without a reference are left out. Raises
    SettingsError for conversations with several recordings or none, and if more than half of the
    utterances have the same text: then no such swap exists.
    """
    if not all(map(is_swappable, utterances)):
        raise SettingsError(
            "swap_audio: takes recordings and conversations with one recording; leave it out"
        )
    known = {i: u for i, u in enumerate(utterances) if u.text is not None}
    groups = [
        {i: u for i, u in known.items() if (u.dialog is None) == one} for one in (True, False)
    ]
    swapped = {i: u for group in groups if group or not known for i, u in _swap(group, normalize)}
    return [swapped[i] for i in sorted(swapped)]


def _swap(
    utterances: Mapping[int, Utterance], normalize: Normalizer
) -> list[tuple[int, Utterance]]:
    """Each utterance with the audio of another; all are recordings, or all conversations."""
    texts = {i: normalize(u.text or "") for i, u in utterances.items()}
    # sorting by hash puts equal texts next to each other, but not similar ones
    order = sorted(texts, key=lambda i: (hashlib.sha256(texts[i].encode()).digest(), i))
    half = len(order) // 2
    most = Counter(texts.values()).most_common(1)[0][1] if order else 0
    if not order or most > half:
        raise SettingsError(
            "swap_audio: needs two or more utterances with references, at most half of them with "
            "the same text"
        )
    sources = [_source(utterances[i]) for i in order]
    # a rotation by at least `most`, in either direction, gives each another text
    rotations = sorted(range(most, len(order) - most + 1), key=lambda r: abs(r - half))
    tried = rotations[:MOST_TRIALS]
    good = (rotation for rotation in tried if not _kept(sources, rotation))
    rotation = next(good, None) or min(tried, key=lambda rotation: _kept(sources, rotation))
    return [
        (i, _with_audio_of(utterances[i], utterances[order[(rank + rotation) % len(order)]]))
        for rank, i in enumerate(order)
    ]


def _kept(sources: Sequence[str], rotation: int) -> int:
    """How many utterances would keep their recording, as another row has the same one."""
    rotated = [*sources[rotation:], *sources[:rotation]]
    return sum(one == other for one, other in zip(sources, rotated, strict=True))


def _source(utterance: Utterance) -> str:
    """The file and offset of its recording."""
    if utterance.dialog is None:
        return utterance.source or utterance.id
    (clip,) = utterance.dialog.clips
    return f"{clip.path}@{clip.offset_s}"


def _with_audio_of(utterance: Utterance, other: Utterance) -> Utterance:
    """An utterance with its own id, reference and turns, and everything else of another."""
    own = {"id": utterance.id, "text": utterance.text, "is_seen_text": utterance.is_seen_text}
    if utterance.dialog is None or other.dialog is None:
        return replace(other, **own, audio_of=other.id)
    dialog = _with_recording_of(utterance.dialog, other.dialog)
    return replace(
        other,
        **own,
        audio_of=other.id,
        dialog=dialog,
        read=lambda rate_hz: joined(dialog.read(rate_hz)),
    )


def _with_recording_of(dialog: EvaluatedDialog, other: EvaluatedDialog) -> EvaluatedDialog:
    (clip,) = other.clips
    turns = (replace(t, clip=clip) if isinstance(t, AudioTurn) else t for t in dialog.turns)
    return replace(dialog, turns=tuple(turns))
