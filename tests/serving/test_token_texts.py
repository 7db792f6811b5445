"""The bytes of the tokens of a response join to its text, whatever the tokenizer."""

from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.serving.token_texts import shown_token, token_bytes

LLMS = Path(__file__).parents[1] / "data" / "llm"
TEXT = "the close café: 東京 \N{BLACK STAR}, a  clone"


@pytest.mark.parametrize("llm", ["llama", "qwen3"])
def test_the_bytes_of_tokens_join_to_the_text(llm):
    tokenizer = Tokenizer(LLMS / llm)
    ids = np.array(tokenizer.text_to_ids(TEXT))
    for count in range(len(ids) + 1):
        joined = b"".join(token_bytes(tokenizer, ids[:count]))
        assert joined.decode() == tokenizer.ids_to_text(ids[:count])


def test_byte_level_tokens_are_told_as_text_or_bytes():
    tokenizer = Tokenizer(LLMS / "qwen3")
    ids = np.array(tokenizer.text_to_ids(" clo\N{BLACK STAR} a"))
    spellings, data = tokenizer.ids_to_tokens(ids), token_bytes(tokenizer, ids)
    assert all(len(own) == len(one) for own, one in zip(data, spellings, strict=True))
    shown = [shown_token(own, one) for own, one in zip(data, spellings, strict=True)]
    assert not any("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}" in one for one in shown)
    assert shown[0].startswith(" ") and r"bytes:\xe2" in shown


def test_a_special_token_is_spelt_and_has_no_bytes():
    tokenizer = Tokenizer(LLMS / "qwen3")
    special = tokenizer.special_tokens["eos_token"]
    ids = np.array([tokenizer.token_to_id(special), *tokenizer.text_to_ids("a")])
    first, second = token_bytes(tokenizer, ids)
    assert shown_token(first, special) == special and (first, second) == (b"", b"a")
