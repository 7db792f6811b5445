"""Times of words: silences, phrases, estimates, and the whole path with a small CTC model."""

from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.inference.timestamps import ctc_aligner
from speechlm2_jax.inference.timestamps.bounds import CTC_TIMING, TimedLabel, word_spans
from speechlm2_jax.inference.timestamps.speech import Silence, find_silences
from speechlm2_jax.inference.timestamps.word_times import word_times
from speechlm2_jax.models import CTCModel

CTC = Path(__file__).parents[1] / "data" / "asr" / "ctc.nemo"
ALIGN = ctc_aligner.align_batch
RATE_HZ = 16000
EDGES = [Silence(0.0, 0.2), Silence(1.2, 1.4)]


def tone(*spans, duration_s, noise=0.0):
    """A tone in each of `spans` (seconds), and noise throughout."""
    times = np.arange(int(duration_s * RATE_HZ)) / RATE_HZ
    wave = noise * np.random.default_rng(0).normal(size=len(times))
    for start, end in spans:
        wave += np.where((times >= start) & (times < end), np.sin(2000 * times), 0.0)
    return wave.astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_silences_are_found_in_noise(noise):
    wave = tone((0.3, 1.0), (1.1, 1.5), (2.0, 2.6), duration_s=3, noise=noise)
    found = find_silences(wave, RATE_HZ)
    expected = [(0.0, 0.3), (1.5, 2.0), (2.6, 3.0)]  # 0.1 s is shorter than a silence
    np.testing.assert_allclose(found, expected, atol=0.011)


def test_silences_do_not_drift_where_frames_are_no_whole_samples():
    rate_hz = 22050  # 220.5 samples in 10 ms
    wave = np.zeros(60 * rate_hz, np.float32)
    wave[50 * rate_hz : 55 * rate_hz] = 0.5
    found = find_silences(wave, rate_hz)
    np.testing.assert_allclose(found, [(0.0, 50.0), (55.0, 60.0)], atol=0.011)


def test_a_quiet_recording_has_no_silence_between_words():
    assert find_silences(np.zeros(16000, np.float32), RATE_HZ) == [(0.0, 0.0), (1.0, 1.0)]
    assert find_silences(np.zeros(9, np.float32), RATE_HZ)[-1].end == 9 / RATE_HZ


def labels_at(bounds, letters, words, timing=CTC_TIMING, frame_s=0.08):
    """Labels between `bounds`, emitted just where the model of `timing` expects them."""
    found = []
    for a, b, n, word in zip(bounds, bounds[1:], letters, words, strict=False):
        middle = a + timing.emission_point * (b - a) + timing.delay_frames * frame_s
        found.append(TimedLabel(word, n, (middle - frame_s / 2, middle + frame_s / 2)))
    return found


def test_labels_where_they_are_expected_give_back_the_times():
    labels = labels_at([0.2, 0.4, 0.7, 1.0, 1.2], [2, 3, 3, 2], [0, 1, 1, 2])
    found = word_spans(labels, EDGES, frame_s=0.08)
    np.testing.assert_allclose(found, [(0.2, 0.4), (0.4, 1.0), (1.0, 1.2)], atol=1e-9)


def test_a_silence_parts_two_words():
    silences = [Silence(0.0, 0.2), Silence(0.8, 1.3), Silence(1.9, 2.0)]
    labels = labels_at([0.2, 0.8], [6], [0]) + labels_at([1.3, 1.9], [6], [1])
    found = word_spans(labels, silences, frame_s=0.08)
    np.testing.assert_allclose(found, [(0.2, 0.8), (1.3, 1.9)], atol=1e-9)


def test_a_word_without_labels_takes_the_time_between_its_neighbours():
    labels = labels_at([0.2, 0.5, 0.8, 1.2], [3, 3, 4], [0, 1, 2])
    labels[1] = labels[1]._replace(emitted=None)
    found = word_spans(labels, EDGES, frame_s=0.08)
    np.testing.assert_allclose(found, [(0.2, 0.5), (0.5, 0.8), (0.8, 1.2)], atol=1e-9)


def test_without_frames_letters_share_the_speech():
    labels = [TimedLabel(0, 2, None), TimedLabel(1, 8, None)]
    found = word_spans(labels, EDGES, frame_s=0.08)
    np.testing.assert_allclose(found, [(0.2, 0.4), (0.4, 1.2)], atol=1e-9)


def test_spans_never_overlap_and_stay_in_the_recording():
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts = np.sort(rng.uniform(-0.2, 2.0, 8))
        labels = [
            TimedLabel(n, int(rng.integers(0, 6)), (t, t + 0.08)) for n, t in enumerate(starts)
        ]
        silences = [Silence(0.0, 0.1), Silence(0.6, 0.9), Silence(1.7, 1.8)]
        flat = np.array(word_spans(labels, silences, frame_s=0.08)).reshape(-1)
        assert (np.diff(flat) >= 0).all() and flat[0] >= 0 and flat[-1] <= 1.8


@pytest.fixture(scope="module")
def aligner():
    return CTCModel.from_pretrained(CTC).aligner()


@pytest.fixture(scope="module")
def word(aligner):
    """A word that the small model knows."""
    known = (w for w in ("the", "a", "no", "on", "is") if aligner.encoder([w])[0].labels)
    return next(known)


def test_words_of_a_text_come_back_as_they_are_written(aligner, word):
    wave = tone((0.2, 1.6), duration_s=1.9)
    text = f"{word.title()}, 42 {word}!"
    (found,) = word_times([wave], [text], aligner, offsets_s=[10.0])
    assert [w.text for w in found.words] == text.split() and found.problem is None
    assert [w.is_estimated for w in found.words] == [False, True, False]
    (aligned,) = aligner.align([wave], [text.split()])
    expected = [np.exp(x) for x in aligned.log_probs if x is not None]
    own = [w.confidence for w in found.words if w.confidence is not None]
    assert found.words[1].confidence is None and own == pytest.approx(expected)
    assert all(0 < confidence < 1 for confidence in own)
    times = np.array([(w.start, w.end) for w in found.words]).reshape(-1)
    assert (np.diff(times) >= 0).all() and times[0] >= 10.0 and times[-1] <= 11.9
    assert np.isfinite(found.score) and found.score < 0


def test_neighbours_and_order_change_no_time(aligner, word):
    waves = [tone((0.2, d - 0.2), duration_s=d) for d in (1.0, 2.3, 1.5)]
    texts = [f"{word} {word}", f"{word} {word} {word}", word]
    together = word_times(waves, texts, aligner)
    turned = word_times(waves[::-1], texts[::-1], aligner)[::-1]
    for first, second in zip(together, turned, strict=True):
        assert first.words == second.words
        assert first.score == pytest.approx(second.score, abs=1e-4)


def test_what_does_not_fit_is_told_for_its_row_alone(aligner, word):
    wave = tone((0.1, 0.5), duration_s=0.6)
    long, short, empty, nothing = word_times(
        [wave, wave, wave, wave[:0]], [f"{word} " * 60, word, " ", word], aligner
    )
    assert "labels, too many for" in long.problem and long.score is None
    assert len(long.words) == 60 and all(w.is_estimated for w in long.words)
    assert long.words[-1].end <= 0.6
    assert short.problem is None and not short.words[0].is_estimated
    assert empty.words == () and empty.problem is None
    assert nothing.problem == "the recording has no samples" and nothing.words[0].is_estimated


def test_sizes_that_are_compiled_before_change_no_time(aligner, word):
    sizes = aligner.in_sizes([2 * RATE_HZ, RATE_HZ])
    sizes.align([np.zeros(RATE_HZ, np.float32)], [["a"]])
    sizes.align([np.zeros(2 * RATE_HZ, np.float32)], [["a"]])
    programs = ctc_aligner.ctc_log_probs._cache_size(), ALIGN._cache_size()
    for seconds, text in ((0.7, word), (1.9, f"{word} {word} {word}"), (1.2, f"{word} " * 60)):
        wave = tone((0.2, seconds - 0.2), duration_s=seconds)
        (found,) = word_times([wave], [text], sizes)
        counts = ctc_aligner.ctc_log_probs._cache_size(), ALIGN._cache_size()
        assert "too many" in str(found.problem) or counts == programs
        (usual,) = word_times([wave], [text], aligner)
        times = [[(w.text, w.start, w.end) for w in own.words] for own in (found, usual)]
        assert times[0] == times[1] and found.problem == usual.problem
        programs = ctc_aligner.ctc_log_probs._cache_size(), ALIGN._cache_size()


def test_numbers_of_inputs_must_agree(aligner):
    with pytest.raises(ValueError, match="1 recordings, 2 texts and 1 offsets"):
        word_times([np.zeros(9, np.float32)], ["a", "b"], aligner)


def test_a_long_recording_is_encoded_in_windows(aligner, word, monkeypatch):
    wave, text = tone((0.2, 1.7), duration_s=1.9), f"{word} {word} {word}"
    (whole,) = word_times([wave], [text], aligner)
    monkeypatch.setattr(ctc_aligner, "WHOLE_S", 1.0)
    monkeypatch.setattr(ctc_aligner, "WINDOW_S", 2.88)  # one window: as without windows
    monkeypatch.setattr(ctc_aligner, "OVERLAP_S", 0.4)
    (same,) = word_times([wave], [text], aligner)
    assert same.words == whole.words and same.score == pytest.approx(whole.score, abs=1e-4)
    monkeypatch.setattr(ctc_aligner, "WINDOW_S", 1.04)
    counts = []
    monkeypatch.setattr(
        ctc_aligner,
        "align_batch",
        lambda *arrays: counts.append(int(arrays[1][0])) or ALIGN(*arrays),
    )
    (found,) = word_times([wave], [text], aligner)
    samples = len(wave) + 2 * ctc_aligner.SILENT_FRAMES * aligner.frame_samples
    assert counts == [samples // aligner.frame_samples], "every frame once"
    assert found.problem is None and np.isfinite(found.score)
