"""WER of the pretrained encoder alone: its own CTC head on the same recordings."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float

from speechlm2_jax import processes
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.read_audio import read_batches
from speechlm2_jax.inference.long_form.chunks import cut
from speechlm2_jax.inference.long_form.join_texts import join


@runtime_checkable
class EncoderTranscriber(Protocol):
    """An encoder with a CTC head; `speechlm2_jax.models.CTCModel` is one."""

    @property
    def sampling_rate(self) -> int:
        """Input sampling rate in Hz."""
        ...

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        """The text of each float32 [S] recording."""
        ...


def open_ctc_model(nemo_file: Path) -> EncoderTranscriber:
    """Loads an encoder with its CTC head.

    Raises SettingsError or ConversionError for a file without one.
    """
    from speechlm2_jax.models import CTCModel

    return CTCModel.from_pretrained(nemo_file)


class RemembersTexts:
    """An encoder with a CTC head that transcribes each recording once.

    Its transcripts are the drafts of a model first, and its own score after that.
    """

    def __init__(self, model: EncoderTranscriber) -> None:
        self._model = model
        self._texts: dict[bytes, str] = {}

    @property
    def sampling_rate(self) -> int:
        """Input sampling rate in Hz."""
        return self._model.sampling_rate

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[str]:
        """The text of each float32 [S] recording."""
        keys = [hashlib.blake2b(np.asarray(w).tobytes(), digest_size=16).digest() for w in waves]
        new = {k: w for k, w in zip(keys, waves, strict=True) if k not in self._texts}
        if new:
            texts = self._model.transcribe(list(new.values()))
            self._texts |= {key: str(text) for key, text in zip(new, texts, strict=True)}
        return [self._texts[key] for key in keys]


def encoder_texts(
    ctc_model: EncoderTranscriber,
    utterances: Sequence[Utterance],
    batch_size: int,
    max_s: float | None = None,
) -> list[str | None]:
    """Transcripts by the CTC head in input order.

    None for recordings that cannot be read, and for conversations.

    Recordings longer than `max_s` seconds are transcribed in chunks, as by the evaluated model.
    Each of several processes, which all must call it, transcribes every n-th recording.
    """
    # sorted by length, so that a batch needs little padding and few shapes are compiled
    alone = [i for i, u in enumerate(utterances) if u.dialog is None]
    order = sorted(alone, key=lambda i: -utterances[i].duration_s)
    own = order[jax.process_index() :: jax.process_count()]
    found = _texts_of(own, ctc_model, utterances, batch_size, max_s)
    texts: list[str | None] = [None] * len(utterances)
    for one in processes.gather_texts(json.dumps(list(found.items()))):
        for index, text in json.loads(one):
            texts[index] = text
    return texts


def _texts_of(
    order: Sequence[int],
    ctc_model: EncoderTranscriber,
    utterances: Sequence[Utterance],
    batch_size: int,
    max_s: float | None,
) -> dict[int, str]:
    """The transcripts of some recordings by index, without those that cannot be read."""
    read = partial(_read, rate_hz=ctc_model.sampling_rate)
    texts: dict[int, str] = {}
    for batch in read_batches(utterances, order, read, batch_size, what="encoder alone:"):
        texts |= zip(
            batch, _transcribe(ctc_model, list(batch.values()), max_s, batch_size), strict=True
        )
    return texts


def _transcribe(
    ctc_model: EncoderTranscriber,
    waves: Sequence[Float[np.ndarray, " _"]],
    max_s: float | None,
    batch_size: int,
) -> list[str]:
    """The text of each recording, `batch_size` chunks at a time."""
    cuts = [cut(wave, rate_hz=ctc_model.sampling_rate, max_s=max_s) for wave in waves]
    clips = [w[c.start : c.end] for w, chunks in zip(waves, cuts, strict=True) for c in chunks]
    starts = range(0, len(clips), batch_size)
    texts = (text for s in starts for text in ctc_model.transcribe(clips[s : s + batch_size]))
    return [join(list(itertools.islice(texts, len(chunks))), chunks) for chunks in cuts]


def _read(utterance: Utterance, rate_hz: int) -> Float[np.ndarray, " S"] | None:
    """A recording; None if it cannot be read, which the model's evaluation has reported."""
    try:
        return utterance.read(rate_hz)
    except AudioError:
        return None
