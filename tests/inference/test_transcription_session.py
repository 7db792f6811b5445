"""Live transcription by a CTC head: the texts are those of the whole recording."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.inference.sessions.transcription_session import GrowingTranscript
from speechlm2_jax.models import ASRModel, CTCModel

ROOT = Path(__file__).parents[2]
STREAMING = ROOT / "tests" / "data" / "asr" / "hybrid_streaming.nemo"
WAVE, RATE_HZ = soundfile.read(ROOT / "corpus" / "audio" / "test" / "0000.ogg", dtype="float32")


@pytest.fixture(scope="module")
def model():
    return ASRModel.from_pretrained(STREAMING, decoder="ctc")


@pytest.fixture(scope="module")
def session(model):
    return model.session()


def updates_of(session, wave, sizes):
    session.reset()
    found, start = [], 0
    while start < len(wave):
        size = next(sizes)
        found += session.push(wave[start : start + size])
        start += size
    return [*found, *session.finish()]


@pytest.mark.parametrize("size", [333, 1280, 5000, len(WAVE)])
def test_texts_of_any_pushes_are_those_of_the_whole_recording(model, session, size):
    updates = updates_of(session, WAVE, iter(lambda: size, None))
    joined = " ".join(filter(None, (update.text for update in updates)))
    assert joined == model.transcribe([WAVE])[0]
    assert joined and updates[-1].partial == ""
    assert all(a.known_s <= b.known_s for a, b in zip(updates, updates[1:], strict=False))
    assert updates[-1].known_s == pytest.approx(len(WAVE) / RATE_HZ)


def test_samples_of_another_rate_are_resampled(model):
    session = model.session(sampling_rate=48_000)
    updates = updates_of(session, np.repeat(WAVE, 3), iter(lambda: 7000, None))
    assert updates[-1].known_s == pytest.approx(len(WAVE) / RATE_HZ, abs=1e-3)


def test_the_state_does_not_grow_and_a_session_ends_once(session):
    session.reset()
    before = session.state_bytes
    list(session.push(WAVE))
    assert session.state_bytes == before > 0
    list(session.finish())
    with pytest.raises(ValueError, match="has ended"):
        session.push(WAVE)


def test_what_cannot_stream_is_named():
    whole = CTCModel.from_pretrained(ROOT / "configs" / "parts" / "tiny_encoder.nemo")
    with pytest.raises(ValueError, match="normalize"):
        whole.session()
    with pytest.raises(ValueError, match='decoder="ctc"'):
        ASRModel.from_pretrained(STREAMING).session()


PIECES = ("▁turn", "▁o", "ff", "▁the", ".", "▁")


def join(labels):
    text = "".join(PIECES[label] for label in labels).replace("▁", " ").strip()
    return text.replace(" .", ".")


@pytest.mark.parametrize(
    ("path", "words", "last"),
    [
        ([6, 0, 0, 6, 1, 2, 2, 6], ["turn"], "off"),
        ([0, 6, 0, 1, 6, 2, 3, 6], ["turn", "turn", "off"], "the"),
        ([0, 5, 4, 3], ["turn."], "the"),  # punctuation belongs to the word before it
        ([6, 6], [], ""),
    ],
)
def test_a_word_is_whole_when_the_next_one_begins(path, words, last):
    transcript = GrowingTranscript(join, blank=6)
    assert [word for label in path if (word := transcript.add(label))] == words
    assert transcript.partial == transcript.finish() == last
    assert transcript.partial == ""
