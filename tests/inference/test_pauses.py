"""Long recordings are cut where people pause; parts without speech and endless repetition show."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechlm2_jax.inference.long_form.pauses import MARGIN_S, SHORTEST_S, Stretch, cut_at_pauses
from speechlm2_jax.inference.long_form.repetition import has_loop, without_loop

RATE_HZ = 16_000


def tone(seconds: float, level: float = 0.3) -> np.ndarray:
    samples = np.arange(int(seconds * RATE_HZ))
    return (level * np.sin(2 * np.pi * 200 * samples / RATE_HZ)).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=int(seconds * RATE_HZ))
    return (1e-4 * noise).astype(np.float32)


def seconds(parts: list[Stretch]) -> list[tuple[float, float]]:
    return [(round(p.start / RATE_HZ, 2), round(p.end / RATE_HZ, 2)) for p in parts]


def test_parts_are_the_sentences_between_long_pauses():
    spoken = [tone(3), silence(0.3), tone(4), silence(1), tone(5), silence(1), tone(4)]
    parts = cut_at_pauses(np.concatenate(spoken), rate_hz=RATE_HZ, max_s=9.0)
    inside = [(0.0, 7.3 + MARGIN_S), (8.3 - MARGIN_S, 13.3 + MARGIN_S), (14.3 - MARGIN_S, 18.3)]
    for found, wanted in zip(seconds(parts), inside, strict=True):
        assert found == pytest.approx(wanted, abs=0.03)


def test_a_part_does_not_go_on_behind_a_sentence_for_a_longer_pause():
    spoken = [tone(2), silence(0.5), tone(2), silence(0.9), tone(2)]
    parts = cut_at_pauses(np.concatenate(spoken), rate_hz=RATE_HZ, max_s=5.0)
    assert [round(start, 1) for start, _ in seconds(parts)] == [0.0, 2.4, 5.3]


def test_a_short_recording_is_one_part():
    assert cut_at_pauses(tone(2), rate_hz=RATE_HZ, max_s=2.0) == [Stretch(0, 2 * RATE_HZ)]
    assert cut_at_pauses(tone(9), rate_hz=RATE_HZ, max_s=None) == [Stretch(0, 9 * RATE_HZ)]
    assert cut_at_pauses(tone(0), rate_hz=RATE_HZ, max_s=2.0) == [Stretch(0, 0, False)]


def test_without_pauses_the_quietest_place_is_taken():
    parts = cut_at_pauses(
        np.concatenate([tone(7), tone(0.3, 0.08), tone(5)]), rate_hz=RATE_HZ, max_s=10.0
    )
    assert len(parts) == 2 and 6.9 < parts[0].end / RATE_HZ < 7.4
    assert 0 <= parts[1].start - parts[0].end <= 0.11 * RATE_HZ


def test_silence_is_told_apart():
    recording = np.concatenate([tone(5), silence(30), tone(5)])
    parts = cut_at_pauses(recording, rate_hz=RATE_HZ, max_s=8.0)
    assert [round(start) for start, _ in seconds(parts)] == [0, 35]
    assert all(p.has_speech for p in parts)
    assert cut_at_pauses(silence(30) * 1e-2, rate_hz=RATE_HZ, max_s=8.0) == []
    click = np.zeros(3 * RATE_HZ, np.float32)
    click[RATE_HZ : RATE_HZ + 100] = 1.0
    for quiet in (np.zeros(RATE_HZ, np.float32), 1e-6 * tone(1), click):
        assert not cut_at_pauses(quiet, rate_hz=RATE_HZ, max_s=5.0)[0].has_speech


@given(st.lists(st.tuples(st.floats(0.1, 6.0), st.floats(0.0, 2.0)), min_size=1, max_size=8))
def test_parts_are_in_order_short_enough_and_hold_all_speech(pattern):
    wave = np.concatenate([part for s, p in pattern for part in (tone(s), silence(p))])
    parts = cut_at_pauses(wave, rate_hz=RATE_HZ, max_s=3.0)
    assert all(0 < p.end - p.start <= 3 * RATE_HZ + 160 for p in parts)
    assert all(a.end <= b.start for a, b in zip(parts, parts[1:], strict=False))
    is_kept = np.zeros(len(wave), bool)
    for part in parts:
        is_kept[part.start : part.end] = True
    lost_s = (np.abs(wave[~is_kept]) > 0.3 * 0.2).sum() / RATE_HZ
    assert lost_s < SHORTEST_S * len(pattern)  # less than that, in one place, is a click


def test_loops_are_written_once():
    assert without_loop("so " + "thank you " * 9 + "bye") == "so thank you bye"
    assert without_loop("the " * 40) == "the"
    assert without_loop("I fine: " + "we will go home, " * 4) == "I fine: we will go home,"
    fine = "no, no, no! it is  very very good, bye bye bye"
    assert without_loop(fine) == fine and not has_loop(fine)
    assert has_loop("a b c " * 6) and not has_loop("") and without_loop("") == ""


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_without_a_loop_there_is_none_left(words):
    assert not has_loop(without_loop(" ".join(words)))
