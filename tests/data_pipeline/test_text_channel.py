"""Text channels become text as NeMo writes it, with and without times."""

import json
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data.duplex.text_channel import channel_texts, timed_texts
from speechlm2_jax.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "text_channel"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
PAD = GOLDEN["pad_id"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(FOLDER)


def test_texts_equal_nemo(tokenizer):
    given = np.array(GOLDEN["tokens"]), GOLDEN["lens"]
    assert channel_texts(*given, tokenizer, pad_id=PAD) == GOLDEN["text"]


@pytest.mark.parametrize(("with_ends", "key"), [(False, "turn_taking"), (True, "turn_taking_eot")])
def test_timed_texts_equal_nemo_which_shows_rows_whole(tokenizer, with_ends, key):
    tokens = np.array(GOLDEN["tokens"])
    whole = np.full(len(tokens), tokens.shape[1])
    found = timed_texts(tokens, whole, tokenizer, pad_id=PAD, with_ends_of_text=with_ends)
    assert found == GOLDEN[key]


def test_no_token_is_beyond_the_length(tokenizer):
    tokens = np.array(GOLDEN["tokens"])[:1]
    assert timed_texts(tokens, [8], tokenizer, pad_id=PAD) == [" <|0.16|> hi how are you"]
    assert timed_texts(tokens, [3], tokenizer, pad_id=PAD, frame_s=0.5) == [" <|1.0|> "]
