"""Prompt formats give NeMo's ids, masks and splits, for both kinds of tokenizer."""

import json
from functools import cache
from pathlib import Path

import pytest

from speechlm2_jax.data.prompts import FORMATS, PromptError, PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data" / "prompts"
GOLDEN = json.loads((DATA / "prompts.json").read_text())
TOKENIZERS = ("tok_spm", "tok_bpe")
TAG = "<|audioplaceholder|>"
QUESTION = [("user", "Some question"), ("user", TAG)]
CONVERSATIONS = {
    "conversation_text_audio_answer": [*QUESTION, ("assistant", "ok then")],
    "conversation_audio_text_audio_answer": [
        ("user", TAG),
        *QUESTION,
        ("assistant", "ok"),
        ("user", "more"),
        ("assistant", "fine"),
    ],
    "conversation_infer": QUESTION,
    "conversation_audio_answer": [("user", "Some question"), ("assistant", TAG)],
}
WITH_SYSTEM = [("system", "Be nice."), *QUESTION, ("assistant", "ok then")]


@cache
def tokenizer(name):
    return Tokenizer(DATA / name)


def assert_equal(prompt, golden):
    assert prompt.input_ids.tolist() == golden["input_ids"]
    assert len(prompt.context_ids) == golden["n_context"]
    answer = None if prompt.answer_ids is None else len(prompt.answer_ids)
    assert answer == golden.get("n_answer")
    mask = None if prompt.mask is None else "".join("01"[int(m)] for m in prompt.mask)
    assert mask == golden.get("mask")


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_dialog_encodes_as_in_nemo_or_is_refused_as_there(tokenizer_name, name):
    formatter = PromptFormatter(name, tokenizer(tokenizer_name))
    for dialog, golden in GOLDEN["results"][tokenizer_name][name].items():
        if "error" in golden:
            with pytest.raises(PromptError, match="has no role"):
                formatter.encode_dialog(GOLDEN["dialogs"][dialog])
        else:
            assert_equal(formatter.encode_dialog(GOLDEN["dialogs"][dialog]), golden)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_join_turns_of_one_role_by_a_space_as_in_nemo(name, case):
    formatter = PromptFormatter(name, tokenizer("tok_spm"))
    prompt = formatter.encode_dialog(formatter.dialog(CONVERSATIONS[case]))
    assert_equal(prompt, GOLDEN["examples"][name][case])


def test_a_system_turn_where_the_format_has_one_encodes_as_in_nemo():
    for name in ("llama3", "nemotron-h"):
        formatter = PromptFormatter(name, tokenizer("tok_spm"))
        golden = GOLDEN["examples"][name]["conversation_with_system_turn"]
        assert_equal(formatter.encode_dialog(formatter.dialog(WITH_SYSTEM)), golden)


def test_llama2_puts_the_system_text_into_the_first_user_turn_once():
    """NeMo 3.0.0 repeats it as a user message of its own; the right form is its `attr_only`."""
    formatter = PromptFormatter("llama2", tokenizer("tok_spm"))
    golden = GOLDEN["examples"]["llama2"]["conversation_with_system_attr_only"]
    assert_equal(formatter.encode_dialog(formatter.dialog(WITH_SYSTEM)), golden)


def test_a_format_without_a_place_for_a_system_prompt_refuses_it_as_nemo_does():
    for name in ("qwen", "plain", "gemma", "mistral"):
        assert "error" in GOLDEN["examples"][name]["conversation_with_system_turn"]
        with pytest.raises(PromptError, match="no place for a system prompt"):
            PromptFormatter(name, tokenizer("tok_spm")).dialog(WITH_SYSTEM)
