"""Swaps audio between utterances: a model that uses the audio now gets every text wrong."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.metrics.wer import Normalizer
from speechlm2_jax.settings import SettingsError


def swap_audio(utterances: Sequence[Utterance], normalize: Normalizer) -> list[Utterance]:
    """Gives every utterance that has a reference the audio of one with another reference.

    The swap is deterministic and uses each recording once. Utterances without a reference are left
    out. Raises SettingsError for conversations, and if more than half of the utterances have the
    same text: then no such swap exists.
    """
    if any(u.dialog is not None for u in utterances):
        raise SettingsError("swap_audio: takes recordings, not conversations; leave it out")
    texts = {i: normalize(u.text) for i, u in enumerate(utterances) if u.text is not None}
    # sorting by hash puts equal texts next to each other, but not similar ones
    order = sorted(texts, key=lambda i: (hashlib.sha256(texts[i].encode()).digest(), i))
    half = len(order) // 2
    if not order or Counter(texts.values()).most_common(1)[0][1] > half:
        raise SettingsError(
            "swap_audio: needs two or more utterances with references, at most half of them with "
            "the same text"
        )
    audio_of = {i: order[(rank + half) % len(order)] for rank, i in enumerate(order)}
    return [_with_audio_of(utterances[i], utterances[audio_of[i]]) for i in sorted(audio_of)]


def _with_audio_of(utterance: Utterance, other: Utterance) -> Utterance:
    """An utterance with its own id and reference, and everything else of another."""
    own = {"id": utterance.id, "text": utterance.text, "is_seen_text": utterance.is_seen_text}
    return replace(other, **own, audio_of=other.id)
