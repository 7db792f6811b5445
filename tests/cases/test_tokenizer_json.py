"""A tokenizer file that is none, or that expands a text without end, is one error that names it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from speechlm2_jax.data import tokenizer_file
from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError

LLM = Path(__file__).resolve().parents[1] / "data" / "llm"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 7031645\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LLM / "qwen3", tmp_path / "qwen3"))


def change(folder: Path, **values: object) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, object]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*steps: dict[str, object]) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": list(steps)}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the file is empty; fetch the file again"),
        (LFS, "Git LFS pointer.*run `git lfs pull`"),
        ("<!DOCTYPE html><html>", "a web page"),
        ("[" * 200_000, "nested too deeply; fetch"),
        ('{"model": ' * 200_000, "nested too deeply; fetch"),
        ("{", "not JSON: .*; fetch"),
        ("[]", 'no block "model"; fetch'),
        ('{"model": {"type": "Unheard"}}', "model.type is 'Unheard', expected BPE.*name another"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(folder, content, problem):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=rf"tokenizer \S+/tokenizer\.json: .*{problem}") as e:
        Tokenizer(folder)
    assert "\n" not in str(e.value)


def test_a_sentencepiece_model_that_is_a_pointer_is_named_too(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_text(LFS)
    with pytest.raises(TokenizerError, match=rf"{re.escape(str(file))}: a Git LFS pointer"):
        Tokenizer(file)


@pytest.mark.parametrize(
    "steps",
    [
        [replace("a", "a" * 13)] * 3,
        [replace("a", "aa")] * 60,
        [replace(".", "$0 ", "Regex")] * 40,
        [replace("a", "b" * 100_000)],
    ],
)
def test_steps_that_expand_a_text_without_end_are_refused_before_they_run(folder, steps):
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added.append(dict(added[0], content="aaa", id=added[-1]["id"] + 1, normalized=True))
    change(folder, normalizer=sequence(*steps), added_tokens=added)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: its Replace steps can make"):
        Tokenizer(folder)


def test_a_text_that_gives_far_too_many_tokens_is_refused(folder):
    change(folder, normalizer=sequence(*[replace("a", "a" * 12)] * 2))
    tokenizer = Tokenizer(folder)
    assert tokenizer.text_to_ids("bbb")
    for encode in (tokenizer.text_to_ids, tokenizer.text_to_tokens):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: made 15840 tokens of 110 char"):
            encode("a" * 110)


def test_a_regex_that_backtracks_without_end_is_an_error(folder, monkeypatch):
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    change(folder, pre_tokenizer=split | {"pattern": {"Regex": "(a+)+$"}})
    tokenizer = Tokenizer(folder)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot encode.*retry-limit"):
        tokenizer.text_to_ids("a" * 40 + "b")
    monkeypatch.setattr(tokenizer_file, "PATIENCE_S", 1)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: a text of .* took over 1 s"):
        tokenizer.text_to_ids(("a" * 20 + "b") * 100)


def test_steps_as_real_tokenizers_have_them_pass(folder):
    steps = [replace(" ", "<space>"), replace("\n", "<newline>"), replace(r"\s+", " ", "Regex")]
    change(folder, normalizer=sequence({"type": "NFKC"}, *steps, replace("<", "")))
    assert Tokenizer(folder).texts_to_ids(["a b\nc" * 50, "", "ﷺ" * 40])
