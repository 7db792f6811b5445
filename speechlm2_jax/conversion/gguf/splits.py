"""How byte-level tokenizers split a text before they merge, by `tokenizer.ggml.pre`.

The regular expressions are those of each model's own tokenizer.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_SIGNS, _SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS_AND_SLASHES}|{_SPACES}"
GPT4O = (
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"|{_SIGNS_AND_SLASHES}|{_SPACES}"
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What happens to a text before the merges."""

    regex: str | None = None
    """Every match is merged on its own; None: GPT-2's expression."""
    digits: bool = False
    """Every digit stands alone."""
    composes: bool = False
    """The text is brought into Unicode's form NFC first."""
    whole_words: bool = False
    """A match that is a token is not merged (ignore_merges)."""
    adds_bos: bool = False
    """Where the file does not tell whether texts begin with the bos token."""

    def normalizer(self) -> dict[str, Any] | None:
        """The block of tokenizer.json."""
        return {"type": "NFC"} if self.composes else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """The block of tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.regex is not None:
            pattern = {"Regex": self.regex}
            steps.append(
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            )
        steps.append(byte_level(use_regex=self.regex is None))
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """The step that writes every byte as one printable character."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


_LLAMA3 = Split(regex=LLAMA3, whole_words=True, adds_bos=True)
_DIGITS = Split(digits=True)
SPLITS: Mapping[str, Split] = MappingProxyType(
    {
        "gpt-2": Split(),
        "smollm": _DIGITS,
        "starcoder": _DIGITS,
        "refact": _DIGITS,
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "falcon3": _LLAMA3,
        "smaug-bpe": Split(regex=LLAMA3),
        "dbrx": Split(regex=LLAMA3),
        "qwen2": Split(regex=QWEN2, composes=True),
        "deepseek-r1-qwen": Split(regex=QWEN2),
        "tekken": Split(regex=TEKKEN, whole_words=True, adds_bos=True),
        "gpt-4o": Split(regex=GPT4O),
    }
)
"""`tokenizer.ggml.pre` -> how it splits."""
