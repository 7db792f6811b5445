# pyright: basic
"""The tokens of a GGUF file -> tokenizer.json and tokenizer_config.json of Hugging Face."""

from collections.abc import Iterator, Mapping
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.gguf.splits import SPLITS, Split, byte_level
from speechlm2_jax.conversion.gguf.vocabulary import (
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    PREFIX,
    UNKNOWN,
    USER_DEFINED,
    GgufVocabulary,
)
from speechlm2_jax.llm.families.errors import shown

Json = dict[str, Any]
SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def tokenizer_json(vocabulary: GgufVocabulary) -> Json:
    """The content of tokenizer.json.

    Raises ConversionError for a way of splitting that is not known, and for merges of strings that
    are no tokens.
    """
    is_byte_level = vocabulary.model == BYTE_LEVEL
    parts = _byte_level_parts(vocabulary) if is_byte_level else _sentencepiece_parts(vocabulary)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _post_processor(vocabulary, parts["adds_bos"]),
        "decoder": parts["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **parts["model"],
            "vocab": {token: index for index, token in enumerate(vocabulary.tokens)},
            "merges": parts["merges"],
        },
    }


def tokenizer_config(vocabulary: GgufVocabulary, longest: int) -> Json:
    """The content of tokenizer_config.json; `longest` is the length of the model's context."""
    special = {
        f"{name}_token": vocabulary.tokens[index] for name, index in vocabulary.special.items()
    }
    template = vocabulary.chat_template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        **special,
        **({} if template is None else {"chat_template": template}),
    }


def _added_tokens(vocabulary: GgufVocabulary) -> list[Json]:
    """Tokens that a text is split at first. Control tokens are special, the user's are text."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _post_processor(vocabulary: GgufVocabulary, adds_bos: bool) -> Json | None:
    """Puts bos before and eos behind a text, where the caller asks for special tokens."""
    ends = {
        "bos": adds_bos if vocabulary.adds_bos is None else vocabulary.adds_bos,
        "eos": bool(vocabulary.adds_eos),
    }
    ids = {
        name: vocabulary.special[name]
        for name, is_on in ends.items()
        if is_on and name in vocabulary.special
    }
    byte_step = byte_level(use_regex=True) if vocabulary.model == BYTE_LEVEL else None
    if not ids:
        return byte_step

    def template(sequence: str, kind: int) -> list[Json]:
        def special(name: str) -> list[Json]:
            if name not in ids:
                return []
            return [{"SpecialToken": {"id": vocabulary.tokens[ids[name]], "type_id": kind}}]

        text: Json = {"Sequence": {"id": sequence, "type_id": kind}}
        return [*special("bos"), text, *special("eos")]

    tokens = {vocabulary.tokens[i]: i for i in ids.values()}
    templates: Json = {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in tokens.items()},
    }
    return templates if byte_step is None else {
        "type": "Sequence", "processors": [byte_step, templates]
    }  # fmt: skip


def _byte_level_parts(vocabulary: GgufVocabulary) -> Json:
    """Byte-level BPE with the file's merges."""
    split = _split(vocabulary)
    return {
        "adds_bos": split.adds_bos,
        "normalizer": split.normalizer(),
        "pre_tokenizer": split.pre_tokenizer(),
        "decoder": byte_level(use_regex=True),
        "model": {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.whole_words,
        },
        "merges": list(_file_merges(vocabulary)),
    }


def _split(vocabulary: GgufVocabulary) -> Split:
    split = SPLITS.get(vocabulary.pre or "default")
    if split is not None:
        return split
    why = f"{PREFIX}pre {shown(vocabulary.pre)} is not supported"
    if vocabulary.pre in (None, "default"):
        why = f"{PREFIX}pre does not tell how texts are split, as in files of before May 2024"
    raise ConversionError(
        f"{vocabulary.path}: {why}; supported are {', '.join(SPLITS)}; use a newer file, or name "
        "the original tokenizer in model.tokenizer_path"
    )


def _file_merges(vocabulary: GgufVocabulary) -> Iterator[list[str]]:
    tokens = set(vocabulary.tokens)
    for merge in vocabulary.merges:
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or not {left, right, left + right} <= tokens:
            raise ConversionError(
                f"{vocabulary.path}: the merge {shown(merge)} is not of two tokens to a third"
            )
        yield [left, right]


def _sentencepiece_parts(vocabulary: GgufVocabulary) -> Json:
    """BPE over characters; what is no token is written as the tokens of its bytes."""
    adds_space = vocabulary.adds_space is not False
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if adds_space else []
    decoder: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.special.get("unk")
    return {
        "adds_bos": True,
        "normalizer": {"type": "Sequence", "normalizers": [*before, to_mark]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
        },
        "merges": _scored_merges(vocabulary),
    }


def _scored_merges(vocabulary: GgufVocabulary) -> list[list[str]]:
    """Merges that choose as SentencePiece does: the pair whose union has the highest score.

    Equal pairs are ordered by the ids of their parts, as transformers orders them.
    """
    ids: Mapping[str, int] = {
        token: index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == NORMAL
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in ids.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                ranked.append((-vocabulary.scores[index], ids[left], ids[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]
