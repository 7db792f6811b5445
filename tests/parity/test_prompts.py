"""Prompt formats give NeMo's ids, masks and splits, for both kinds of tokenizer."""

import json
import random
from functools import cache
from pathlib import Path

import pytest

from speechlm2_jax.data.prompts import FORMATS, PromptError, PromptFormatter, thinking
from speechlm2_jax.data.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data" / "prompts"
GOLDEN = json.loads((DATA / "prompts.json").read_text())
MORE = json.loads((DATA / "more.json").read_text())
TOKENIZERS = ("tok_spm", "tok_bpe")
TAG = "<|audioplaceholder|>"
QUESTION = [("user", "Some question"), ("user", TAG)]
NEMOS = list(GOLDEN["examples"])
REFUSED = "has no role|needs a user or a system turn|needs for|needs a text for"
NEMOS_ERRORS = [("canary", "pnc Yes")]
"""NeMo accepts "Yes" and writes the token of "no"."""
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
    length = None if prompt.answer_ids is None else len(prompt.answer_ids)
    assert length == golden.get("n_answer")
    mask = None if prompt.mask is None else "".join("01"[int(m)] for m in prompt.mask)
    assert mask == golden.get("mask")


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", [*NEMOS, "example_prompt_format"])
def test_every_dialog_encodes_as_in_nemo_or_is_refused_as_there(tokenizer_name, name, monkeypatch):
    formatter = PromptFormatter(name, tokenizer(tokenizer_name))
    recorded = [r[tokenizer_name].get(name, {}) for r in (GOLDEN["results"], MORE)]
    for dialog, golden in [item for results in recorded for item in results.items()]:
        turns = golden.get("turns") or GOLDEN["dialogs"][dialog.partition("@")[0]]
        draw = random.Random(golden.get("random_seed"))
        monkeypatch.setattr(thinking, "dialog_rng", lambda _, draw=draw: draw)
        if "error" in golden:
            with pytest.raises(PromptError, match=REFUSED):
                formatter.encode_dialog(turns)
        elif (name, dialog) in NEMOS_ERRORS:
            assert formatter.encode_dialog(turns).input_ids.tolist() != golden["input_ids"]
        else:
            assert_equal(formatter.encode_dialog(turns, **golden.get("kwargs", {})), golden)


@pytest.mark.parametrize("name", NEMOS)
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_join_turns_of_one_role_by_a_space_as_in_nemo(name, case):
    formatter = PromptFormatter(name, tokenizer("tok_spm"))
    dialog, golden = formatter.dialog(CONVERSATIONS[case]), GOLDEN["examples"][name][case]
    if "error" in golden:
        with pytest.raises(PromptError, match="needs a text for"):
            formatter.encode_dialog(dialog)
    else:
        assert_equal(formatter.encode_dialog(dialog), golden)


def test_a_system_turn_where_the_format_has_one_encodes_as_in_nemo():
    for name in ("llama3", "nemotron-h"):
        formatter = PromptFormatter(name, tokenizer("tok_spm"))
        golden = GOLDEN["examples"][name]["conversation_with_system_turn"]
        assert_equal(formatter.encode_dialog(formatter.dialog(WITH_SYSTEM)), golden)


def test_chatml_is_qwen_with_a_system_turn_and_example_is_nemos_example():
    assert set(FORMATS) == {*NEMOS, "example_prompt_format", "example", "chatml"}
    for name, equal in (("chatml", "qwen"), ("example", "example_prompt_format")):
        for dialog in CONVERSATIONS.values():
            one, other = (PromptFormatter(n, tokenizer("tok_bpe")) for n in (name, equal))
            prompt, expected = (f.encode_dialog(f.dialog(dialog)) for f in (one, other))
            assert prompt.input_ids.tolist() == expected.input_ids.tolist()
            assert prompt.prompt_ids.tolist() == expected.prompt_ids.tolist()
    formatter = PromptFormatter("chatml", tokenizer("tok_bpe"))
    prompt = formatter.encode_dialog(formatter.dialog(WITH_SYSTEM))
    text = formatter.tokenizer.ids_to_text(prompt.input_ids, remove_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nSome question "
        f"{TAG}<|im_end|>\n<|im_start|>assistant\nok then<|im_end|>\n"
    )


def test_a_language_whose_token_is_missing_is_named():
    slots = {"source_lang": "en", "target_lang": "xx", "task": "asr", "pnc": "yes"}
    with pytest.raises(PromptError, match=r"target_lang='xx' needs the token '<\|xx\|>'"):
        PromptFormatter("canary", tokenizer("tok_bpe")).encode_dialog(
            [{"role": "user", "slots": slots}]
        )


def test_the_context_of_a_thinking_format_ends_as_its_response_begins():
    dialog = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    spelled = tokenizer("tok_bpe")
    for name, empty in (
        ("qwen3", "<think>\n\n</think>\n\n"),
        ("nemotron-nano-v3", "<think></think>"),
    ):
        formatter = PromptFormatter(name, spelled)
        prompt = formatter.encode_dialog(dialog)
        again = formatter.encode_dialog(dialog)
        assert prompt.input_ids.tolist() == again.input_ids.tolist()  # drawn from the text
        opening = spelled.text_to_ids(f"<|im_start|>assistant\n{empty}")
        assert prompt.prompt_ids.tolist() == [*prompt.context_ids, *opening]
        thoughtful = [dialog[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo."}]
        opening = spelled.text_to_ids(
            "<|im_start|>assistant\n" + ("" if name == "qwen3" else "<think>\n")
        )
        prompt = formatter.encode_dialog(thoughtful)
        assert prompt.prompt_ids.tolist() == [*prompt.context_ids, *opening]


def test_broken_thoughts_are_refused():
    formatter = PromptFormatter("qwen3", tokenizer("tok_bpe"))
    for response in ("So.</think>", "Well <think>hm</think> so.", "<think>hm"):
        dialog = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": response}]
        with pytest.raises(PromptError, match="'qwen3': a response with a thought must be <think>"):
            formatter.encode_dialog(dialog)


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
