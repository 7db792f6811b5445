"""Noise at a given signal-to-noise ratio, and what is generated without speech."""

import json

import numpy as np
import pytest
import soundfile

from speechlm2_jax.evaluation.add_noise import add_noise, mix
from speechlm2_jax.evaluation.inputs import Utterance, read_inputs
from speechlm2_jax.evaluation.read_audio import clips
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed
from speechlm2_jax.evaluation.score_table import table
from speechlm2_jax.settings import SettingsError

RATE_HZ = 16_000
SPEECH = np.sin(np.arange(RATE_HZ) / 9).astype(np.float32)


def utterance(name, wave=SPEECH):
    return Utterance(id=name, duration_s=1.0, text="a", read=lambda rate_hz: wave, source=name)


def snr_db(noisy):
    return 10 * np.log10(np.mean(SPEECH**2) / np.mean((noisy - SPEECH) ** 2))


@pytest.fixture
def noise_file(tmp_path):
    path = tmp_path / "noise.wav"
    noise = 0.01 * np.random.default_rng(0).standard_normal(RATE_HZ // 3)
    soundfile.write(path, noise, RATE_HZ)
    return str(path)


@pytest.mark.parametrize("ratio", [-3, 6, 24])
def test_the_ratio_of_powers_is_the_one_asked_for(ratio, noise_file):
    for noise in (noise_file, "white"):
        (noisy,) = add_noise([utterance("a")], noise, ratio)
        wave = noisy.read(RATE_HZ)
        assert wave.dtype == np.float32 and wave.shape == SPEECH.shape
        assert snr_db(wave) == pytest.approx(ratio, abs=0.01)


def test_each_recording_has_its_own_noise_always_the_same(noise_file):
    for noise in (noise_file, "white"):
        first, second = add_noise([utterance("a"), utterance("b")], noise, 6)
        assert not np.array_equal(first.read(RATE_HZ), second.read(RATE_HZ))
        (again,) = add_noise([utterance("a")], noise, 6)
        np.testing.assert_array_equal(first.read(RATE_HZ), again.read(RATE_HZ))
        other = add_noise([utterance("a")], noise, 7)[0]
        assert len({first.source, other.source, "a"}) == 3  # a resumed evaluation starts anew


def test_the_recordings_of_a_conversation_are_noisy_where_the_model_reads_them(wav, tmp_path):
    wav("a.wav", 0.5), wav("b.wav", 0.25)
    turns = [
        {"from": "User", "type": "audio", "value": "a.wav", "duration": 0.5},
        {"from": "User", "type": "audio", "value": "b.wav", "duration": 0.25},
        {"from": "Assistant", "type": "text", "value": "yes"},
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "d", "conversations": turns}))
    clean = read_inputs(tmp_path / "d.jsonl")
    noisy = add_noise(clean, "white", 6)
    (one,) = [found for (found,) in clips(noisy, ahead=1, rate_hz=RATE_HZ, max_s=None)]
    np.testing.assert_array_equal(one.samples, noisy[0].read(RATE_HZ))  # what a report plays
    (before,) = [found for (found,) in clips(clean, ahead=1, rate_hz=RATE_HZ, max_s=None)]
    noises = [a - b for a, b in zip(one.recordings, before.recordings, strict=True)]
    for noise, wave in zip(noises, before.recordings, strict=True):
        assert 10 * np.log10(np.mean(wave**2) / np.mean(noise**2)) == pytest.approx(6, abs=0.01)
    assert abs(np.corrcoef(noises[0][: len(noises[1])], noises[1])[0, 1]) < 0.1
    assert one.dialog.with_response("yes") == before.dialog.with_response("yes")


def test_silence_stays_silent():
    silence = np.zeros(9, np.float32)
    np.testing.assert_array_equal(mix(silence, np.ones(9, np.float32), 6), silence)


def test_noise_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="noise: nowhere.wav is no file; name a recording, or"):
        add_noise([utterance("a")], "nowhere.wav", 6)
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(SettingsError, match="noise: "):
        add_noise([utterance("a")], str(tmp_path / "text.wav"), 6)
    soundfile.write(tmp_path / "silent.wav", np.zeros(99), RATE_HZ)
    with pytest.raises(SettingsError, match="is silent"):
        add_noise([utterance("a")], str(tmp_path / "silent.wav"), 6)


def test_characters_without_speech_are_counted_per_minute():
    responses = (
        Response(id="a", duration_s=30.0, text="", pred_text=" hello "),
        Response(id="b", duration_s=15.0, text=" ", pred_text=""),
        Response(id="c", duration_s=60.0, text="words", pred_text="words"),
        Response(id="d", duration_s=60.0, text="Uh.", pred_text="Uh."),  # no word when normalised
    )
    found = Evaluation(responses=responses, speed=Speed())
    assert found.hallucinated() == pytest.approx(5 / 0.75)
    assert "6.7 characters a minute" in table(found.totals())
    spoken = Evaluation(responses=responses[2:], speed=Speed())
    assert spoken.hallucinated() is None and "hallucinated" not in table(spoken.totals())
