"""The text of tokens without end: the text of decoding all of them, at a constant cost."""

import numpy as np
import pytest

from speechlm2_jax.inference.text_stream import RunningText
from tests.parity.duplex_golden import pretrained


class Bytes:
    """Tokens are bytes, of which several form a character."""

    def __init__(self):
        self.longest = 0

    def ids_to_text(self, ids):
        self.longest = max(self.longest, len(ids))
        return bytes(np.asarray(ids).tolist()).decode("utf-8", errors="replace")

    def ids_to_tokens(self, ids):
        return [chr(n) for n in ids]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🙂 end", ""])
def test_pieces_of_bytes_join_to_the_text(text):
    running, ids = RunningText(Bytes()), list(text.encode())
    pieces = [running.add(n) for n in ids]
    assert "".join(pieces) + running.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_is_given_out_at_the_end():
    running = RunningText(Bytes())
    assert (running.add(0x61), running.add(0xC3)) == ("a", "")
    assert running.finish() == "\ufffd"


def test_each_token_costs_as_much_as_the_first():
    tokenizer = Bytes()
    running = RunningText(tokenizer)
    for n in range(300):
        running.add(97 + n % 26)
    assert tokenizer.longest <= 2


def test_pieces_of_a_tokenizer_join_to_its_text():
    tokenizer = pretrained("duplex_s2s").tokenizer
    ids = np.random.default_rng(0).integers(3, 40, 200)
    running = RunningText(tokenizer)
    assert "".join(running.add(n) for n in ids.tolist()) + running.finish() == (
        tokenizer.ids_to_text(ids)
    )


def test_a_tokenizer_that_changes_its_text_does_not_stop_the_stream():
    class Joining(Bytes):
        def ids_to_text(self, ids):
            return super().ids_to_text(ids).replace(" ,", ",")

    running = RunningText(Joining())
    assert "".join(running.add(n) for n in b"so , it is") + running.finish() == "so , it is"
