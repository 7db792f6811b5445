"""Recordings are read ahead, but no more of them than memory has room for."""

import numpy as np
import pytest

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.read_audio import clips

RATE_HZ, AHEAD, MAX_S = 100, 4, 2.0


def recording(duration_s, begun, *, is_broken=False):
    def read(rate_hz):
        begun.append(duration_s)
        if is_broken:
            raise AudioError("no sound", cause="unreadable")
        return np.zeros(round(duration_s * rate_hz), np.float32)

    return Utterance(id=f"{duration_s}", duration_s=duration_s, text=None, read=read)


def most_held_s(durations, max_s):
    """Seconds of recordings begun and not yet given, at most; also how many were given."""
    begun, held, given_s, given = [], [], 0.0, 0
    recordings = [recording(s, begun) for s in durations]
    for found in clips(recordings, ahead=AHEAD, rate_hz=RATE_HZ, max_s=max_s):
        given += 1
        given_s += found[0].recording_samples / RATE_HZ
        held.append(sum(begun) - given_s)
    return max(held), given


@pytest.mark.parametrize("count", [1, 12])
def test_long_recordings_are_read_as_the_room_allows(count):
    held_s, given = most_held_s([AHEAD * MAX_S] * count, MAX_S)
    assert given == count and held_s <= AHEAD * MAX_S


def test_short_recordings_are_read_so_many_ahead():
    held_s, given = most_held_s([1.0] * 12, MAX_S)
    assert given == 12 and held_s <= AHEAD


def test_one_that_cannot_be_read_is_told_and_the_others_come_longest_first():
    begun = []
    recordings = [
        recording(1.0, begun),
        recording(5.0, begun),
        recording(3.0, begun, is_broken=True),
    ]
    found = list(clips(recordings, ahead=AHEAD, rate_hz=RATE_HZ, max_s=MAX_S))
    assert [f[0] if isinstance(f, tuple) else f[0].index for f in found] == [1, 2, 0]
    assert len(found[0]) > 1 and isinstance(found[1][1], AudioError) and len(found[2]) == 1
