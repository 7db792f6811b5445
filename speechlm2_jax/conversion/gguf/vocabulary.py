# pyright: basic
"""The tokens of a GGUF file: `tokenizer.ggml.*`, checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import GgufFile
from speechlm2_jax.llm.families.errors import shown

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens (`llama_token_type`)."""
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""tokenizer.ggml.model: byte-level BPE with merges, SentencePiece BPE with scores."""
MAX_TOKEN_CHARACTERS = 1 << 10
SPECIAL = MappingProxyType(
    {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id",
     "pad": "padding_token_id"}
)  # fmt: skip
DEFAULT_IDS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {SENTENCEPIECE: {"bos": 1, "eos": 2, "unk": 0}, BYTE_LEVEL: {}}
)
"""Where a file names none."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TOKENS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
    "<eos>",
)
"""Tokens that end a generation in every model that has them, as in llama.cpp."""


@dataclass(frozen=True, kw_only=True)
class GgufVocabulary:
    """The tokens of a file, and how texts become tokens."""

    path: Path
    model: str
    """`BYTE_LEVEL` or `SENTENCEPIECE`."""
    pre: str | None
    """How a text is split before merging (`tokenizer.ggml.pre`)."""
    tokens: list[str]
    """Without unused ones at the end, which only fill the embedding table."""
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: Mapping[str, int]
    """bos, eos, unk, pad -> id, where there is one."""
    ends: list[int]
    """Ids that end a generation, the file's own first."""
    adds_bos: bool | None
    adds_eos: bool | None
    adds_space: bool | None
    """Whether a space is put before a text. None in these three: the kind of tokenizer decides."""
    chat_template: str | None


def read_vocabulary(file: GgufFile) -> GgufVocabulary:
    """Reads the tokens of a file.

    Raises ConversionError for another kind of tokenizer, lists of other lengths, two equal tokens,
    and ids beyond the tokens.
    """
    reader = _Reader(file)
    model = reader.value("model", str, None)
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise reader.error(
            f"{PREFIX}model {shown(model)} is not supported; supported are {BYTE_LEVEL} and "
            f"{SENTENCEPIECE}"
        )
    tokens, types = reader.tokens()
    count = len(tokens)
    scores = reader.listing("scores", (int, float), count) if model == SENTENCEPIECE else []
    if not all(map(math.isfinite, scores)):
        raise reader.error(f"{PREFIX}scores are not all finite")
    merges = reader.listing("merges", (str,), None) if model == BYTE_LEVEL else []
    special = dict(DEFAULT_IDS[model])
    special |= {n: i for n, key in SPECIAL.items() if (i := reader.id(key, count)) is not None}
    ends = [reader.id(key, count) for key in END_KEYS]
    ends.append(special.get("eos"))
    whole = (CONTROL, USER_DEFINED)
    ends += [i for i, token in enumerate(tokens) if types[i] in whole and token in END_TOKENS]
    used = 1 + max((i for i, kind in enumerate(types) if kind != UNUSED), default=-1)
    used = max(used, 1 + max(special.values(), default=-1))
    return GgufVocabulary(
        path=file.path,
        model=model,
        pre=reader.value("pre", str, None),
        tokens=tokens[:used],
        types=types[:used],
        scores=scores[:used],
        merges=merges,
        special={name: index for name, index in special.items() if index < used},
        ends=list(dict.fromkeys(i for i in ends if i is not None and i < used)),
        adds_bos=reader.value("add_bos_token", bool, None),
        adds_eos=reader.value("add_eos_token", bool, None),
        adds_space=reader.value("add_space_prefix", bool, None),
        chat_template=_chat_template(file),
    )


def _chat_template(file: GgufFile) -> str | None:
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ConversionError(f"{file.path}: tokenizer.chat_template is no text")
    return template


class _Reader:
    """Values below `tokenizer.ggml.`, with their types checked."""

    def __init__(self, file: GgufFile):
        self.file = file

    def error(self, problem: str) -> ConversionError:
        """An error that names the file."""
        return ConversionError(f"{self.file.path}: {problem}")

    def value(self, key: str, kind: type, default: Any) -> Any:
        """One value of this type."""
        value = self.file.metadata.get(PREFIX + key, default)
        if value is not default and type(value) is not kind:
            raise self.error(f"{PREFIX}{key}={shown(value)} is no {kind.__name__}")
        return value

    def listing(self, key: str, kinds: tuple[type, ...], count: int | None) -> list[Any]:
        """A list of `count` elements of these types; None: of any length."""
        value: Any = self.file.metadata.get(PREFIX + key)
        is_list = isinstance(value, list) and all(type(v) in kinds for v in value)
        if not is_list or count not in (None, len(value)):
            expected = "texts" if count is None else f"{count} values, one per token"
            raise self.error(f"{PREFIX}{key} should be a list of {expected}")
        return value

    def id(self, key: str, count: int) -> int | None:
        """The id of a token; None where the key is missing, or -1 as some writers mean by it."""
        value = self.value(key, int, None)
        if value is None or value in (-1, 0xFFFFFFFF):
            return None
        if not 0 <= value < count:
            raise self.error(f"{PREFIX}{key}={value}, but there are {count} tokens")
        return value

    def tokens(self) -> tuple[list[str], list[int]]:
        """Texts and types of all tokens; empty texts get a name, as in llama.cpp."""
        texts = self.listing("tokens", (str,), None)
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
        if not texts:
            raise self.error(f"{PREFIX}tokens is empty")
        if len(set(texts)) != len(texts):
            seen: set[str] = set()
            twice = next(t for t in texts if t in seen or seen.add(t))
            raise self.error(f"the token {shown(twice)} is there twice")
        longest = max(texts, key=len)
        if len(longest) > MAX_TOKEN_CHARACTERS:
            raise self.error(f"a token has {len(longest)} characters: {shown(longest)}")
        if PREFIX + "token_type" not in self.file.metadata:
            return texts, [NORMAL] * len(texts)
        types = self.listing("token_type", (int,), len(texts))
        if unknown := set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
            raise self.error(f"{PREFIX}token_type has unknown types {sorted(unknown)[:5]}")
        return texts, types
