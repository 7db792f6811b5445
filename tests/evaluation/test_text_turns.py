"""Text channels of both sides: turns, words, token counts."""

import numpy as np
import pytest

from speechlm2_jax.evaluation.duplex.turns import text_turns
from speechlm2_jax.evaluation.metrics.token_accuracy import TokenAccuracy, count_tokens
from speechlm2_jax.evaluation.metrics.turn_taking import Turns, count_turns, turn_marks

PAD, BOS, EOS = 0, 1, 2
PIECES = {3: " good", 4: " morn", 5: "ing"}


def detokenize(ids):
    return "".join(PIECES[i] for i in ids)


def turns(tokens, **options):
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": PAD}
    return text_turns(tokens, detokenize, **ids, frame_s=0.5, **options)


def test_words_start_with_their_first_token():
    (turn,) = turns([PAD, BOS, 3, PAD, 4, 5, PAD, EOS])
    assert (turn.start_s, turn.end_s, turn.text) == (0.5, 3.5, "good morning")
    assert [(word.start_s, word.text) for word in turn.words] == [(1.0, "good"), (2.0, "morning")]


def test_generated_turns_are_a_frame_later():
    tokens = [BOS, 3, EOS]
    (turn,) = turns(tokens, first_frame=1)
    assert (turn.start_s, turn.end_s, turn.words[0].start_s) == (0.5, 1.5, 1.0)
    ids = {"bos_id": BOS, "eos_id": EOS, "frame_s": 0.5, "first_frame": 1}
    found = Turns.from_tokens(np.array(tokens), **ids)
    assert (found.starts.tolist(), found.ends.tolist()) == ([0.5], [1.5])


def test_turns_end_with_the_next_one_or_the_channel_and_strays_with_their_last_token():
    found = turns([4, PAD, BOS, 3, BOS, 3, EOS, 5, PAD])
    assert [(t.start_s, t.end_s, t.text, t.is_marked) for t in found] == [
        (0.0, 0.5, "morn", False),
        (1.0, 2.0, "good", True),
        (2.0, 3.0, "good", True),
        (3.5, 4.0, "ing", False),
    ]
    assert found[0].plain() == {"start": 0.0, "end": 0.5, "text": "morn", "outside": True}
    (open_end,) = turns([BOS, 3])
    assert (open_end.end_s, open_end.is_marked) == (1.0, True)
    assert turns([]) == [] and turns([PAD, PAD]) == []


def test_tokens_are_compared_where_there_is_a_target():
    bos, eos, quiet = 8, 9, 7
    codes = np.array([quiet, quiet, bos, 1, 2, eos, quiet, quiet, bos, 3])[:, None].repeat(2, 1)
    generated = codes.copy()
    generated[3, 1] = generated[0] = 5  # one wrong code in a turn; frame 0 has no target
    text = np.array([PAD, BOS, 3, EOS, PAD])
    counts = count_tokens(
        text, codes, np.array([3, BOS, 4, EOS, PAD]), generated, pad_id=PAD, bos=bos, eos=eos
    )
    assert (counts.text, counts.text_right) == (3, 2)
    assert (counts.codes, counts.codes_right, counts.codes_silent) == (12, 11, 0)
    accuracy = TokenAccuracy()
    accuracy.update("a", counts)
    accuracy.update("a", counts)
    assert accuracy.compute()["txt_token_acc"] == pytest.approx(2 / 3)
    assert accuracy.compute()["audio_token_acc_a"] == pytest.approx(11 / 12)
    assert TokenAccuracy().compute() == {}


def test_marks_are_what_is_counted():
    user = Turns.from_segments([(0.0, 2.0), (5.0, 7.0), (10.0, 11.0), (20.0, 21.0)])
    agent = Turns.from_segments([(2.5, 5.9), (8.0, 13.0)])
    marks, counts = turn_marks(user, agent), count_turns(user, agent)
    kinds = [mark.kind for mark in marks]
    assert kinds.count("response") == counts.with_response == 2
    assert kinds.count("unanswered") == counts.user_turns - counts.with_response
    assert kinds.count("barge_in") == counts.yielded == 1
    assert kinds.count("barge_in") + kinds.count("talked_over") == counts.barge_ins == 2
    delays = [mark.seconds for mark in marks if mark.kind == "response"]
    assert delays == pytest.approx(list(counts.latencies_s))
