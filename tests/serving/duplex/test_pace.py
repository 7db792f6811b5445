"""Late, lost and fast audio of the user: what is filled in, and what is dropped."""

import pytest

from speechlm2_jax.serving.duplex.pace import JITTER_S, InputPace

CHUNK_S = 0.08
STALL_S = 0.4


def live(seconds, pace, start_s=0.0, drift=1.0):
    """Audio of a microphone, in packets of 20 ms; returns the time at its end."""
    for n in range(round(seconds / 0.02)):
        now_s = start_s + 0.02 * drift * (n + 1)
        assert pace.late_s(now_s, 0.02) == 0.0
        assert pace.missing_s(now_s, CHUNK_S) == 0.0
    return now_s


def ticks(pace, begin_s, end_s, step_s=0.02):
    """The silence that is filled in between two times."""
    count = round((end_s - begin_s) / step_s)
    return sum(pace.missing_s(begin_s + step_s * (n + 1), CHUNK_S) for n in range(count))


@pytest.mark.parametrize("drift", [0.999, 1.0, 1.001])
def test_the_clock_of_a_client_may_drift(drift):
    pace = InputPace(STALL_S)
    live(600, pace, drift=drift)
    assert pace.is_live


def test_silence_stands_in_for_late_audio_which_is_dropped_when_it_comes():
    pace = InputPace(STALL_S)
    now_s = live(5, pace)
    filled_s = ticks(pace, now_s, now_s + 2.0)
    assert filled_s == pytest.approx(2.0, abs=CHUNK_S) and pace.is_stalled
    dropped_s = sum(pace.late_s(now_s + 2.0, 0.02) for _ in range(100))  # the 2 s that were late
    assert dropped_s == pytest.approx(2.0 - JITTER_S, abs=CHUNK_S)
    assert not pace.is_stalled
    live(5, pace, now_s + 2.0)


def test_nothing_is_dropped_after_a_pause_of_the_client():
    pace = InputPace(STALL_S)
    now_s = live(5, pace)
    ticks(pace, now_s, now_s + 10.0)
    live(5, pace, now_s + 10.0)
    assert pace.is_live


def test_jitter_is_no_stall():
    pace = InputPace(STALL_S)
    now_s = live(5, pace)
    assert ticks(pace, now_s, now_s + STALL_S - 0.04) == 0.0
    assert sum(pace.late_s(now_s + 0.38, 0.02) for _ in range(19)) == 0.0


def test_a_recording_is_kept_whole_and_real_time_begins_at_its_end():
    pace = InputPace(STALL_S)
    assert sum(pace.late_s(0.001 * n, 0.02) for n in range(500)) == 0.0  # 10 s within half a second
    assert not pace.is_live
    assert ticks(pace, 0.5, 0.8) == 0.0
    assert ticks(pace, 0.8, 2.5) == pytest.approx(2.0, abs=0.1)
    assert sum(pace.late_s(2.5 + 0.001 * n, 0.02) for n in range(500)) == 0.0


def test_before_the_first_audio_nothing_is_missing():
    pace = InputPace(STALL_S)
    assert ticks(pace, 0.0, 5.0) == 0.0
    assert live(5, pace, 5.0) == pytest.approx(10.0)
