"""Audio swapped between utterances: a model that listens now answers with other words."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.metrics.wer import Normalizer
from speechlm2_jax.settings import SettingsError


def swap_audio(utterances: Sequence[Utterance], normalize: Normalizer) -> list[Utterance]:
    """Gives every utterance that has a reference the audio of one with another reference.

    The same utterances are always swapped the same way, each recording is heard once, and
    utterances without a reference are left out. Raises SettingsError where no such swap is
    possible: more than half of the utterances have one text.
    """
    texts = {i: normalize(u.text) for i, u in enumerate(utterances) if u.text is not None}
    # a hash keeps equal texts together without putting similar ones side by side
    order = sorted(texts, key=lambda i: (hashlib.sha256(texts[i].encode()).digest(), i))
    half = len(order) // 2
    if not order or Counter(texts.values()).most_common(1)[0][1] > half:
        raise SettingsError(
            "swap_audio: needs two or more utterances with references, at most half of them with "
            "the same text"
        )
    heard = {i: order[(place + half) % len(order)] for place, i in enumerate(order)}
    return [_hearing(utterances[i], utterances[heard[i]]) for i in sorted(heard)]


def _hearing(utterance: Utterance, other: Utterance) -> Utterance:
    """An utterance with its own id and reference and all else of another."""
    return replace(other, id=utterance.id, text=utterance.text, audio_of=other.id)
