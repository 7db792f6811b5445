"""Turn taking on conversations small enough to score by hand."""

import numpy as np
import pytest

from speechlm2_jax.evaluation.metrics.turn_taking import (
    FirstTurnAccuracy,
    TurnCounts,
    Turns,
    TurnTaking,
    count_turns,
)

PAD, BOS, EOS, TEXT = 0, 1, 2, 9


def turns(*segments):
    return Turns.from_segments(segments)


def channel(text):
    """`.` pad, `<` bos, `>` eos, anything else a token."""
    return np.array([{".": PAD, "<": BOS, ">": EOS}.get(c, TEXT) for c in text])


def read(text, frame_s=0.1):
    found = Turns.from_tokens(channel(text), bos_id=BOS, eos_id=EOS, frame_s=frame_s)
    return list(zip(found.starts.round(6).tolist(), found.ends.round(6).tolist(), strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("..<ab.>...", [(0.2, 0.6)]),
        ("<a>.<bc..>", [(0.0, 0.2), (0.4, 0.9)]),
        ("..<ab....", [(0.2, 0.9)]),
        (".<a<b>..", [(0.1, 0.3), (0.3, 0.5)]),
        ("..>.<a>", [(0.4, 0.6)]),
        (".<a>.>.", [(0.1, 0.3)]),
        ("......", []),
        ("", []),
    ],
)
def test_turns_of_a_channel_go_from_bos_to_eos(text, expected):
    assert read(text) == expected


def test_segments_are_sorted_and_must_not_run_backwards():
    assert turns((3.0, 4.0), (1.0, 2.0)).starts.tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match="must not end before it starts"):
        turns((2.0, 1.0))


def test_a_good_conversation():
    counts = count_turns(turns((0.0, 2.0), (5.0, 7.0)), turns((2.5, 4.0), (7.25, 9.0)))
    assert counts == TurnCounts(
        user_turns=2, with_response=2, agent_turns=2, timely=2, latencies_s=(0.5, 0.25)
    )
    assert counts.scores() == {
        "turn_taking_precision": 1.0,
        "turn_taking_recall": 1.0,
        "turn_taking_f1": 1.0,
        "turn_taking_latency_mean_s": 0.375,
        "turn_taking_latency_median_s": 0.375,
    }


@pytest.mark.parametrize(
    ("start", "is_response"),
    [(8.99, False), (9.0, True), (10.0, True), (11.5, True), (11.51, False)],
)
def test_a_response_starts_from_a_second_before_to_one_and_a_half_after(start, is_response):
    counts = count_turns(turns((4.0, 10.0)), turns((start, 15.0)))
    assert (counts.with_response, counts.timely) == (is_response, is_response)
    assert counts.latencies_s == ((pytest.approx(start - 10.0),) if is_response else ())


def test_turns_out_of_place_and_unanswered_ones_count_against():
    user = turns((0.0, 2.0), (10.0, 12.0), (20.0, 22.0))
    agent = turns((2.2, 3.0), (3.2, 4.0), (6.0, 7.0), (16.0, 17.0))
    counts = count_turns(user, agent)
    assert (counts.timely, counts.agent_turns) == (2, 4), (
        "two responses to one turn are both timely"
    )
    assert (counts.with_response, counts.user_turns) == (1, 3)
    assert counts.latencies_s == (pytest.approx(0.2),), "the first of them is the response"
    scores = counts.scores()
    assert scores["turn_taking_f1"] == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))


@pytest.mark.parametrize(
    ("user", "barge_ins", "yielded"),
    [
        ((5.0, 6.0), 1, 1),  # the agent stops 1.5 s later
        ((4.9, 6.0), 1, 0),
        ((6.4, 8.0), 1, 1),
        ((6.5, 8.0), 0, 0),  # it has just stopped
        ((2.0, 3.0), 0, 0),  # both start at once
        ((1.0, 5.0), 0, 0),  # the agent interrupts
    ],
)
def test_a_barge_in_succeeds_if_the_agent_stops_in_time(user, barge_ins, yielded):
    counts = count_turns(turns(user), turns((2.0, 6.5)))
    assert (counts.barge_ins, counts.yielded) == (barge_ins, yielded)
    assert counts.scores().get("barge_in_success") == (yielded if barge_ins else None)


def test_silence_on_one_side():
    alone = count_turns(turns((0.0, 1.0)), turns()).scores()
    assert alone == {"turn_taking_recall": 0.0, "turn_taking_f1": 0.0}
    assert count_turns(turns(), turns((0.0, 1.0))).scores() == {"turn_taking_precision": 0.0}
    assert count_turns(turns(), turns()).scores() == {}


def test_scores_are_by_set_with_the_mean_over_those_that_have_one():
    first, second = TurnTaking(), TurnTaking()
    first.update("a", turns((0.0, 1.0)), turns((1.5, 2.0)))
    second.update("a", turns((0.0, 1.0)), turns())
    second.update("b", turns((0.0, 1.0)), turns((1.25, 9.0)))
    second.update("c", turns(), turns())
    first.merge(second)
    scores = first.compute()
    assert scores["turn_taking_recall_a"] == 0.5
    assert scores["turn_taking_recall_b"] == 1.0
    assert scores["turn_taking_recall"] == 0.75
    assert scores["turn_taking_latency_mean_s"] == pytest.approx(0.375)
    assert not [key for key in scores if key.endswith("_c") or key.startswith("barge_in")]
    assert TurnTaking().compute() == {}


def test_channels_and_segments_of_one_conversation_agree():
    user, agent = (
        "<ab.>...............<c...............>..",
        ".......<ab..................>.........<",
    )
    frame_s = 0.125
    channels = [
        Turns.from_tokens(channel(t), bos_id=BOS, eos_id=EOS, frame_s=frame_s)
        for t in (user, agent)
    ]
    counts = count_turns(*channels)
    assert counts == count_turns(*(turns(*read(t, frame_s)) for t in (user, agent)))
    assert (counts.with_response, counts.timely) == (2, 2)
    assert counts.latencies_s == (0.375, 0.125)
    assert (counts.barge_ins, counts.yielded) == (1, 1)


def test_nemos_first_turn_score():
    metric, other = (
        FirstTurnAccuracy(bos_id=BOS, eos_id=EOS),
        FirstTurnAccuracy(bos_id=BOS, eos_id=EOS),
    )
    user = ["<a>" + "." * 27, "<a>" + "." * 27, "<a>" + "." * 27, "." * 30]
    agent = ["." * 7 + "<b>" + "." * 20, "." * 16 + "<" + "." * 13, "." * 30, "<" + "." * 29]
    metric.update("a", [channel(t) for t in user], [channel(t) for t in agent])
    assert metric.compute() == pytest.approx(
        {
            "turn_taking_acc_a": 1 / 3,  # 5 frames late; 14 frames; never; no user eos
            "turn_taking_acc": 1 / 3,
            "turn_taking_latency_a": 0.4,
            "turn_taking_latency": 0.4,
        }
    )
    other.update("a", [channel("...<a>")], [channel("<b>...")])
    other.merge(metric)
    assert other.compute()["turn_taking_acc"] == 0.5
    assert other.compute()["turn_taking_latency"] == pytest.approx((5 - 5) / 2 * 0.08)
    assert FirstTurnAccuracy(bos_id=BOS, eos_id=EOS).compute() == {}
