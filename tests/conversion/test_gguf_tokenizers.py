"""Tokenizers of GGUF files encode and decode as their originals do; others are refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.gguf import open_gguf, write_directory
from speechlm2_jax.conversion.gguf.splits import SPLITS
from speechlm2_jax.data.tokenizer import Tokenizer
from tests.conversion.gguf_files import Signed, minimal, write_gguf

ROOT = Path(__file__).parents[2]
SPACE = "\u2581"
USER_DEFINED = ("\n", "\n\n", SPACE * 2, SPACE * 3, "<b>")
CONTROL = ("<start_of_turn>", "<end_of_turn>")
TEXTS = (
    "Hello,  world!\n\nThe quick   brown fox's 1234 jumps.",
    "def f(x):\n    return x ** 2\n",
    "e\u0301t\u00e9 \u65e5\u672c\u8a9e \U0001f600\u200d\U0001f525 \u00df\u1e9e",
    " leading, and trailing ",
    "   ",
    "a\tb\r\nc",
    "<b>bold</b>",
    "",
)


def gguf(path: Path, tokenizer: dict[str, Any], rows: int) -> Path:
    """The smallest model, with this tokenizer."""
    keys, tensors = minimal()
    keys = {k: v for k, v in keys.items() if not k.startswith("tokenizer.")} | tokenizer
    tensors["token_embd.weight"] = np.ones((rows, 8), np.float32)
    return write_gguf(path, keys | {"llama.vocab_size": rows}, tensors)


def opened(path: Path) -> Tokenizer:
    write_directory(path, path.with_suffix(""))
    return Tokenizer(path.with_suffix(""))


def trained(*, adds_space: bool) -> SentencePieceProcessor:
    """A SentencePiece BPE model of the documentation, as Llama's or as Gemma's."""
    content = io.BytesIO()
    lines = (ROOT / "docs/conversion.md").read_text().splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in lines if line.strip()),
        model_writer=content,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=adds_space,
        user_defined_symbols=[] if adds_space else list(USER_DEFINED),
        control_symbols=list(CONTROL),
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=content.getvalue())


def sentencepiece_keys(model: SentencePieceProcessor, *, adds_space: bool) -> dict[str, Any]:
    """What llama.cpp's converter writes of a SentencePiece model."""
    count = model.get_piece_size()
    pieces = [model.id_to_piece(i) for i in range(count)]
    kinds = Signed()
    for i, piece in enumerate(pieces):
        is_user_defined = not adds_space and piece in USER_DEFINED
        tests = ((model.is_unknown(i), 2), (model.is_control(i), 3), (is_user_defined, 4))
        kinds.append(next((k for yes, k in (*tests, (model.is_byte(i), 6)) if yes), 1))
    texts = [p.replace(SPACE, " ") if k == 4 else p for p, k in zip(pieces, kinds, strict=True)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [
            -1000.0 if k == 4 else float(model.get_score(i)) for i, k in enumerate(kinds)
        ],
        "tokenizer.ggml.add_space_prefix": adds_space,
    }


@pytest.mark.parametrize("adds_space", [True, False], ids=["Llama", "Gemma"])
def test_sentencepiece_models_encode_and_decode_as_sentencepiece(adds_space, tmp_path):
    model = trained(adds_space=adds_space)
    keys = sentencepiece_keys(model, adds_space=adds_space)
    rows = model.get_piece_size()
    made = opened(gguf(tmp_path / "m.gguf", keys, rows))
    for text in (*TEXTS, (ROOT / "docs/llm.md").read_text()):
        ids = model.encode(text)
        assert made.text_to_ids(text) == ids, text
        assert made.ids_to_text(ids) == model.decode(ids)
    assert (made.bos_id, made.eos_id, made.unk_id, len(made)) == (1, 2, 0, rows)
    turn = [model.piece_to_id(piece) for piece in CONTROL]
    assert made.text_to_ids("<start_of_turn><end_of_turn>") == turn
    config = open_gguf(tmp_path / "m.gguf").generation_config()
    assert config == {"bos_token_id": 1, "eos_token_id": [2, turn[1]]}


TEXT = "I'll pay 1234 \u20ac\n\n   x'S appleTHE"
PIECES = {
    # where each splits the text, as llama.cpp does too
    "gpt-2": "I|'ll| pay| 1234| \u20ac|\n\n  | x|'|S| appleTHE",
    "smollm": "I|'ll| pay| |1|2|3|4| \u20ac|\n\n  | x|'|S| appleTHE",
    "llama-bpe": "I|'ll| pay| |123|4| \u20ac\n\n|  | x|'S| appleTHE",
    "qwen2": "I|'ll| pay| |1|2|3|4| \u20ac\n\n|  | x|'S| appleTHE",
    "tekken": "I|'ll| pay| |1|2|3|4| \u20ac\n\n|  | x|'S| apple|THE",
    "gpt-4o": "I'll| pay| |123|4| \u20ac\n\n|  | x'S| apple|THE",
}


@pytest.mark.parametrize("pre", PIECES)
def test_texts_are_split_as_the_file_tells(pre):
    from tokenizers import Tokenizer as Backend

    model = {"type": "BPE", "vocab": {}, "merges": []}
    blank: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    spec = blank | {"version": "1.0", "added_tokens": [], "decoder": None, "model": model}
    step = Backend.from_str(json.dumps(spec | {"pre_tokenizer": SPLITS[pre].pre_tokenizer()}))
    pieces = [TEXT[slice(*where)] for _, where in step.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert "|".join(pieces) == PIECES[pre]


def byte_level(pre: str, tokens: list[str], merges: list[str], **more: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def test_types_of_tokens_decide_how_they_are_found_and_shown(tmp_path):
    tokens = ["a", "b", "ab", "\u0120", "<|im_end|>", "<think>", "[PAD6]", "[PAD7]"]
    kinds = Signed([1, 1, 1, 1, 3, 4, 5, 5])
    keys = byte_level(
        "gpt-2", tokens, ["a b"], token_type=kinds, bos_token_id=4, add_bos_token=True
    )
    made = opened(gguf(tmp_path / "m.gguf", keys, 10))
    assert len(made) == 6  # unused tokens at the end only fill the table
    ids = made.text_to_ids("ab<think> b<|im_end|>")
    assert ids == [2, 5, 3, 1, 4]
    assert made.ids_to_text(ids) == "ab<think> b"
    assert made.ids_to_text(ids, remove_special_tokens=False) == "ab<think> b<|im_end|>"
    spec = json.loads((tmp_path / "m/tokenizer.json").read_text())
    assert {t["content"]: t["special"] for t in spec["added_tokens"]} == {
        "<|im_end|>": True,
        "<think>": False,
    }
    single = spec["post_processor"]["processors"][1]["single"]
    assert single[0] == {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}} and len(single) == 2


def test_llama3_takes_whole_words_and_begins_with_bos(tmp_path):
    keys = byte_level("llama-bpe", ["a", "b", "ab", "<s>"], [], bos_token_id=3)
    made = opened(gguf(tmp_path / "m.gguf", keys, 4))
    assert made.text_to_ids("ab") == [2]  # no merge makes it
    spec = json.loads((tmp_path / "m/tokenizer.json").read_text())
    assert spec["post_processor"]["processors"][1]["special_tokens"]["<s>"]["ids"] == [3]


def test_the_chat_template_is_the_files(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    keys = byte_level("gpt-2", ["a"], []) | {"tokenizer.chat_template": template}
    write_directory(gguf(tmp_path / "m.gguf", keys, 4), tmp_path / "m")
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    assert config["chat_template"] == template and config["model_max_length"] == 64


ODD = {
    "another kind": (byte_level("gpt-2", ["a"], []) | {"tokenizer.ggml.model": "bert"}, "'bert'"),
    "unknown split": (byte_level("mystery", ["a"], []), r"pre 'mystery'.*smollm"),
    "no split": (byte_level("default", ["a"], []), "does not tell how texts are split"),
    "two equal tokens": (byte_level("gpt-2", ["a", "a"], []), "'a' is there twice"),
    "a merge of no tokens": (byte_level("gpt-2", ["a", "b"], ["a b"]), "merge 'a b'"),
    "a merge of one": (byte_level("gpt-2", ["a", "b"], ["ab"]), "merge 'ab'"),
    "no tokens": (byte_level("gpt-2", [], []), "tokens is empty"),
    "an id beyond": (byte_level("gpt-2", ["a"], [], eos_token_id=7), "eos_token_id=7"),
    "an id of another type": (byte_level("gpt-2", ["a"], [], eos_token_id="x"), "eos_token_id"),
    "types too few": (byte_level("gpt-2", ["a", "b"], [], token_type=Signed([1])), "2 values"),
    "an unknown type": (byte_level("gpt-2", ["a"], [], token_type=Signed([9])), r"types \[9\]"),
    "a long token": (byte_level("gpt-2", ["a" * 5000], []), "5000 characters"),
    "more tokens than rows": (byte_level("gpt-2", list("abcdef"), []), "6 tokens.*of 4"),
    "no scores": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}, "scores"),
    "no number": (
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["a"],
            "tokenizer.ggml.scores": [float("nan")],
        },
        "not all finite",
    ),
    "no tokenizer": ({}, "model None"),
}


@pytest.mark.parametrize("name", ODD)
def test_tokenizers_that_are_not_supported_are_one_line(name, tmp_path):
    keys, match = ODD[name]
    path = gguf(tmp_path / "m.gguf", keys, 4)
    with pytest.raises(ConversionError, match=rf"m\.gguf.*{match}"):
        write_directory(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
