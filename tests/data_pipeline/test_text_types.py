"""Texts without recordings: lines, JSON lines, pairs of lines and chats."""

import gzip
import json
import logging
import random
from pathlib import Path

import pytest

from speechlm2_jax.data import SALMDataset
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.settings import SettingsError, build
from tests.data_pipeline.small_corpus import read_input_cfg, refusal, turns, write_lines

PROMPTS = Path(__file__).parents[1] / "data" / "prompts"
GOLDEN = json.loads((PROMPTS / "prompts.json").read_text())


def read(kind, **more):
    (source,) = read_input_cfg({"type": kind, **more})
    assert source.is_endless
    return source.conversations


def test_each_line_of_plain_text_is_a_response(tmp_path):
    (tmp_path / "a_0.txt").write_text("one  two\n\n three\n")
    (tmp_path / "a_1.txt").write_bytes(gzip.compress("\ufeffvier\r\nfünf".encode()))
    found = read("txt", paths=f"{tmp_path}/a_{{0..1}}.txt", language="en")
    assert [turns(c) for c in found] == [
        [("assistant", text)] for text in ("one  two", " three", "vier", "fünf")
    ]
    assert found[1].id == f"{tmp_path}/a_0.txt line 3"
    (tmp_path / "a_1.txt").write_bytes(b"good\n\xff\n")
    assert "a_1.txt line 2: not UTF-8" in refusal({"type": "txt", "paths": f"{tmp_path}/a_1.txt"})


def test_json_lines_without_a_text_are_left_out_with_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    rows = [{"id": 3, "body": "x", "from": "web"}, {"id": 4}, {"body": "y"}]
    path = write_lines(tmp_path / "m.jsonl", *rows)
    found = read("txt_jsonl", paths=path, text_field="body")
    assert [turns(c) for c in found] == [[("assistant", "x")], [("assistant", "y")]]
    assert found[0].id == "3" and found[0].fields["from"] == "web"
    assert f"{path} line 2: body is missing" in caplog.text
    message = refusal({"type": "txt_jsonl", "paths": path, "text_field": "words"})
    assert f"{path} line 1: words is missing" in message and "set text_field" in message
    write_lines(tmp_path / "m.jsonl", {"transcript": "x"})
    assert "rename 'transcript' to 'text'" in refusal({"type": "txt_jsonl", "paths": path})


def test_long_texts_become_windows_of_so_many_tokens(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one two three four five\nok\n")
    pair = {"source_paths": f"{tmp_path}/a.txt", "target_paths": f"{tmp_path}/a.txt"}
    texts = {"type": "txt", "paths": f"{tmp_path}/a.txt"}
    keys = {"cut_text_into_windows_tokens": 6, "use_multimodal_sampling": True}
    config = build(DataLoaderConfig, {"input_cfg": [texts], "batch_size": 1, **keys})
    dataset = SALMDataset(tokenizer)
    plain, pairs = (
        read_input_cfg(one)[0].conversations for one in (texts, {"type": "txt_pair", **pair})
    )
    found = dataset.variants([*plain, *pairs], config)
    assert list(found[-2:]) == list(pairs)  # a text with a prompt stays whole
    long, short = found[:-3], found[-3]
    ids = tokenizer.text_to_ids("one two three four five")
    windows = [ids[n : n + 6] for n in range(0, len(ids), 6)]
    assert len(windows) > 2
    assert [c.response for c in long] == [tokenizer.ids_to_text(w) for w in windows]
    assert short == plain[1] and long[1].id == f"{plain[0].id} window 2"
    for wrong in ({"use_multimodal_sampling": False}, {"cut_text_into_windows_tokens": 0}):
        with pytest.raises(SettingsError, match="cut_text_into_windows_tokens"):
            build(DataLoaderConfig, {"input_cfg": [texts], "batch_size": 1, **keys, **wrong})


@pytest.fixture
def pairs(tmp_path):
    for name, lines in {"en": "a\nb \n", "pl": " c\nd\n", "ask": "q1\n q2 \nq3\n"}.items():
        (tmp_path / name).write_text(lines)
    return {"source_paths": [str(tmp_path / "en")], "target_paths": [str(tmp_path / "pl")]}


def test_pairs_of_lines_are_a_turn_and_its_response(pairs):
    found = read("txt_pair", **pairs, source_language="en", target_language="pl")
    assert [turns(c) for c in found] == [
        [("user", "a"), ("assistant", "c")],
        [("user", "b"), ("assistant", "d")],
    ]


def test_questions_are_drawn_as_nemo_draws_them(pairs, tmp_path):
    pairs["questions_path"] = str(tmp_path / "ask")
    draws = random.Random(42)
    expected = [draws.choice(["q1", "q2", "q3"]) for _ in range(2)]
    found = read("txt_pair", **pairs, shard_seed=42)
    assert [turns(c)[0] for c in found] == [("user", question) for question in expected]
    (source,) = read_input_cfg({"type": "txt_pair", **pairs}, shard_seed=42, prompt_format="llama2")
    assert [turns(c)[0] for c in source.conversations] == [("system", q) for q in expected]
    (tmp_path / "ask").write_text("")
    assert "no question in it" in refusal({"type": "txt_pair", **pairs})


def test_pairs_of_different_lengths_are_refused(pairs, tmp_path):
    (tmp_path / "pl").write_text("c\n")
    message = refusal({"type": "txt_pair", **pairs})
    assert f"{tmp_path}/pl: has fewer lines than {tmp_path}/en" in message
    pairs["target_paths"] *= 2
    assert "2 files, but source_paths has 1" in refusal({"type": "txt_pair", **pairs})
    del pairs["target_paths"]
    assert "give target_paths" in refusal({"type": "txt_pair", **pairs})


CHAT = {
    "system": "be short",
    "mask": "User",
    "conversations": [
        {"from": "User", "value": "A", "label": None},
        {"from": "Assistant", "value": "B"},
    ],
}


def test_chats_of_sft_files(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", CHAT, {**CHAT, "system": ""})
    one, two = read("nemo_sft_jsonl", paths=[path])
    assert turns(one) == [("system", "be short"), ("user", "A"), ("assistant", "B")]
    assert turns(two) == turns(one)[1:] and one.fields == {"mask": "User"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "conversations is missing; rename 'messages'"),
        ({"conversations": [{"from": "Robot", "value": "x"}]}, "turn 1: from must be User or"),
        ({"conversations": [{"from": "User"}]}, "turn 1: value must be text"),
        ({**CHAT, "system": ["x"]}, "system must be text"),
    ],
)
def test_a_wrong_chat_is_one_line(tmp_path, row, message):
    path = write_lines(tmp_path / "m.jsonl", CHAT, row)
    found = refusal({"type": "nemo_sft_jsonl", "paths": path})
    assert f"{path} line 2: " in found and message in found


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(PROMPTS / "tok_spm")
    tokenizer.add_special_tokens(GOLDEN["special_tokens_added"])
    return tokenizer


FORMATS = ["llama2", "llama3", "gemma", "qwen", "mistral", "plain", "nemotron-h"]
SHORT, LONG = ["Some question", "A1"], ["Some question", "A1", "B", "A2"]


def sft(path, texts, system=""):
    turns = zip(("User", "Assistant") * 2, texts, strict=False)
    rows = [{"from": role, "value": text} for role, text in turns]
    return {
        "type": "nemo_sft_jsonl",
        "paths": write_lines(path, {"conversations": rows, "system": system}),
    }


def entry_of(case, folder):
    files = {"text": "plain pretraining text", "en": "one two", "pl": "jeden dwa"}
    for name, text in {**files, "ask": "translate"}.items():
        (folder / name).write_text(text + "\n")
    pair = {"source_paths": f"{folder}/en", "target_paths": f"{folder}/pl"}
    return {
        "text": {"type": "txt", "paths": f"{folder}/text"},
        "src_tgt": {"type": "txt_pair", **pair},
        "src_tgt_question": {"type": "txt_pair", **pair, "questions_path": f"{folder}/ask"},
        "sft": sft(folder / "long", LONG),
        "sft_system": sft(folder / "short", SHORT, "Be nice."),
    }[case]


CASES = [
    (name, case) for name in FORMATS for case in ("text", "src_tgt", "src_tgt_question", "sft")
]


@pytest.mark.parametrize(("name", "case"), [*CASES, ("llama2", "sft_system")])
def test_prompts_of_texts_equal_nemo(tokenizer, tmp_path, name, case):
    (source,) = read_input_cfg(entry_of(case, tmp_path), prompt_format=name)
    golden = GOLDEN["examples"][name][case]
    formatter = PromptFormatter(name, tokenizer)
    prompt = formatter.encode_dialog(formatter.dialog(source.conversations[0].messages()))
    assert prompt.input_ids.tolist() == golden["input_ids"]
    assert "".join("01"[int(m)] for m in prompt.mask) == golden["mask"]
