"""Events of Full-Duplex-Bench on channels small enough to score by hand."""

import json

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data.conversations import silent_clip
from speechlm2_jax.data.duplex.conversations import DialogEvent, DuplexConversation, SpokenTurn
from speechlm2_jax.evaluation.duplex.benchmark_folder import write_benchmark
from speechlm2_jax.evaluation.duplex.events import user_channel
from speechlm2_jax.evaluation.duplex.inputs import Dialogue
from speechlm2_jax.evaluation.duplex.outputs import OutputFiles
from speechlm2_jax.evaluation.duplex.silent_agent import SilentAgent
from speechlm2_jax.evaluation.metrics.full_duplex import (
    AgentChannel,
    FullDuplex,
    FullDuplexCounts,
    UserChannel,
    audible,
    count_events,
)
from speechlm2_jax.evaluation.metrics.turn_taking import Turns

RATE_HZ = 16_000


def agent(*speech, words=(), turns=None):
    spans = Turns.from_segments(speech)
    text = spans if turns is None else Turns.from_segments(turns)
    return AgentChannel(speech=spans, turns=text, words=np.array(words, np.float64))


SILENT = agent()


@pytest.mark.parametrize(
    ("speech", "words", "latency"),
    [
        ([(2.5, 3.5)], (), 0.5),  # a second of speech
        ([(2.5, 3.4)], (2.5, 2.6, 2.7), None),  # a back-channel of three words
        ([(2.5, 3.4)], (2.5, 2.6, 2.7, 2.8), 0.5),
        ([(2.5, 2.8), (3.2, 3.6)], (), 0.5),  # from the first stretch to the last
        ([(1.5, 3.0)], (), 0.0),  # it begins within the turn
        ([(0.5, 4.0)], (), None),  # long before the end of the turn
        ([], (), None),
    ],
)
def test_a_takeover_is_a_second_or_more_than_three_words(speech, words, latency):
    counts = count_events(UserChannel(turns=[(0.0, 2.0)]), agent(*speech, words=words))
    assert (counts.turns, counts.takeovers) == (1, latency is not None)
    assert counts.latencies_s == (() if latency is None else (pytest.approx(latency),))


def test_each_turn_has_the_response_before_the_next_one():
    user = UserChannel(turns=[(0.0, 2.0), (4.0, 5.0), (8.0, 9.0)])
    counts = count_events(user, agent((2.4, 3.6), (9.2, 10.4)))
    assert counts.takeovers == 2 and counts.latencies_s == pytest.approx((0.4, 0.2))
    assert counts.scores()["takeover_rate"] == pytest.approx(2 / 3)
    assert counts.scores()["takeover_latency_s"] == pytest.approx(0.3)


def test_a_takeover_in_a_pause_begins_there():
    user = UserChannel(turns=[(0.0, 4.0)], pauses=[(1.0, 2.0)])
    assert count_events(user, agent((1.5, 3.0), (4.4, 6.0))).scores() == {
        "takeover_rate": 1.0,
        "pause_takeover_rate": 1.0,
        "takeover_latency_s": pytest.approx(0.4),
    }
    assert count_events(user, agent((1.5, 1.9), (4.4, 6.0))).pause_takeovers == 0


@pytest.mark.parametrize(
    ("speech", "turns", "gone_on"),
    [
        ([(2.0, 4.0)], [(2.0, 4.0)], 1),
        ([(2.0, 2.9)], [(2.0, 2.9)], 0),  # it stops within the back-channel
        ([(2.0, 4.0)], [(2.0, 3.0), (3.2, 4.0)], 0),  # it responds to it
        ([(2.8, 4.0)], [(2.8, 4.0)], 0),  # it is silent when it begins
        ([], [], 0),
    ],
)
def test_the_agent_goes_on_during_a_back_channel(speech, turns, gone_on):
    user = UserChannel(turns=[(0.0, 1.5)], back_channels=[(2.5, 3.0)])
    counts = count_events(user, agent(*speech, turns=turns))
    assert (counts.back_channels, counts.gone_on) == (1, gone_on)


@pytest.mark.parametrize(
    ("speech", "stop_s", "latency_s"),
    [
        ([(2.0, 3.5), (5.4, 7.0)], 0.5, 0.4),
        ([(2.0, 4.6), (5.4, 7.0)], None, 0.4),  # it stops after 1.6 s
        ([(2.0, 3.5)], 0.5, None),
        ([(5.4, 7.0)], None, 0.4),  # it was silent before
        ([], None, None),
    ],
)
def test_the_agent_stops_when_interrupted_and_responds(speech, stop_s, latency_s):
    user = UserChannel(turns=[(0.0, 1.5), (3.0, 5.0)], interruptions=[(3.0, 5.0)])
    counts = count_events(user, agent(*speech))
    assert (counts.turns, counts.interruptions) == (1, 1)
    assert counts.stop_latencies_s == (() if stop_s is None else (pytest.approx(stop_s),))
    found = counts.interruption_latencies_s
    assert found == (() if latency_s is None else (pytest.approx(latency_s),))
    assert counts.interruption_takeovers == len(found)


def test_counts_add_up_and_those_of_silence_handle_pauses_alone():
    user = UserChannel(
        turns=[(0.0, 1.5), (3.0, 5.0)],
        pauses=[(0.5, 1.0)],
        back_channels=[(5.5, 6.0)],
        interruptions=[(3.0, 5.0)],
    )
    counts = count_events(user, agent((2.0, 3.5), (5.2, 7.0)))
    assert count_events(user, SILENT) == counts.of_silence()
    both = counts + counts.of_silence()
    assert (both.turns, both.takeovers, both.gone_on, both.stopped) == (2, 1, 1, 1)
    metric = FullDuplex()
    metric.update("a", counts)
    metric.update("b", counts.of_silence())
    scores = metric.compute()
    assert (scores["takeover_rate_a"], scores["takeover_rate_b"]) == (1.0, 0.0)
    assert scores["takeover_rate"] == scores["interruption_stop_rate"] == 0.5
    assert scores["interruption_latency_s"] == scores["interruption_latency_s_a"]
    assert FullDuplexCounts().scores() == {} and FullDuplex().compute() == {}


def test_speech_is_what_is_louder_than_minus_40_db():
    wave = np.zeros(4 * RATE_HZ, np.float32)
    for start, end, level in ((0.5, 1.0, 0.1), (1.2, 1.6, 0.1), (2.2, 2.24, 0.1), (3, 3.9, 0.005)):
        wave[round(start * RATE_HZ) : round(end * RATE_HZ)] = level
    spans = audible(wave, RATE_HZ, delay_s=0.08)
    assert spans.segments() == [pytest.approx((0.58, 1.68))], "a gap of 0.2 s is part of it"
    assert audible(np.zeros(0, np.float32), RATE_HZ).segments() == []


def conversation(**fields):
    turns = (("user", 0.2, 1.5, "hi there"), ("agent", 1.9, 3.4, "hello"), ("user", 3.0, 5.0, "no"))
    return DuplexConversation(
        id="c1",
        duration_s=7.0,
        sample_rate_hz=RATE_HZ,
        source=silent_clip("u", 7.0),
        target=silent_clip("a", 7.0),
        turns=tuple(SpokenTurn(speaker=w, start_s=a, end_s=b, text=t) for w, a, b, t in turns),
        events=(
            DialogEvent(kind="pause", start_s=0.5, end_s=0.9),
            DialogEvent(kind="interruption", start_s=2.96, end_s=5.0),
        ),
        **fields,
    )


def test_the_users_channel_is_that_of_the_manifest():
    found = user_channel(conversation(), ("user",))
    assert found.turns == [(0.2, 1.5), (3.0, 5.0)] and found.pauses == [(0.5, 0.9)]
    assert found.interruptions == [(3.0, 5.0)], "the turn that begins with the event"
    assert found.back_channels == ()


def test_folders_hold_both_sides_on_one_time_axis(tmp_path):
    dialogues = [Dialogue(set_name="a set", source=conversation()) for _ in range(2)]
    files = OutputFiles.of(dialogues, None, str(tmp_path), ("user",))
    assert files.benchmark[1] == tmp_path / "a_set" / "2" and files.are_lost(1)
    user = np.zeros(7 * RATE_HZ, np.float32)
    user[RATE_HZ] = 0.5
    spoken = np.zeros(7 * 24_000, np.float32)
    spoken[2 * 24_000 : 3 * 24_000] = 0.3
    write_benchmark(
        *(files.benchmark[1], dialogues[1], user, spoken),
        rates_hz=(RATE_HZ, 24_000),
        delay_s=0.08,
        roles=("user",),
    )
    assert not files.are_lost(1)
    waves = {}
    for name in ("input", "output"):
        waves[name], rate_hz = soundfile.read(files.benchmark[1] / f"{name}.wav")
        assert (rate_hz, len(waves[name])) == (RATE_HZ, 7 * RATE_HZ)
    assert waves["input"][RATE_HZ] == pytest.approx(0.5, abs=1e-4)
    loud = np.flatnonzero(np.abs(waves["output"]) > 0.15) / RATE_HZ
    assert (loud[0], loud[-1]) == pytest.approx((2.08, 3.08), abs=1e-3)
    read = {path.name: json.loads(path.read_text()) for path in files.benchmark[1].glob("*.json")}
    assert read["metadata.json"] == {
        "id": "c1",
        "context_text": "hi there",
        "current_turn_text": "no",
        "timestamps": [2.96, 5.0],
    }
    assert read["pause.json"] == [{"text": "[PAUSE]", "timestamp": [0.5, 0.9]}]
    assert read["interrupt.json"][0]["timestamp"] == [2.96, 5.0]
    assert read["turn_taking.json"][0]["timestamp"][0] == 5.0


def test_a_silent_agent_is_scored_in_the_same_conversations():
    silent = SilentAgent("none")
    silent.update("a", "yes it is", Turns.from_segments([(0.0, 1.0)]))
    silent.add_events("a", FullDuplexCounts(turns=1, takeovers=1, latencies_s=(0.2,), pauses=2))
    scores = silent.compute()
    assert scores["right_text"] == scores["txt_bleu"] == scores["turn_taking_f1"] == 0.0
    assert scores["wer"] == scores["cer"] == scores["empty_text_rate"] == 1.0
    assert (scores["takeover_rate_a"], scores["pause_takeover_rate"]) == (0.0, 0.0)
    assert "takeover_latency_s" not in scores
    assert "wer" not in SilentAgent(has_speech=False).compute()
