"""Checks of tokenizer files: why one cannot be read, and how far one may expand a text."""

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from speechlm2_jax.settings import SettingsError, parse_json

GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""transformers' names, old and new, of the class that tokenizer.json alone describes."""
GENERIC_MODEL_TYPES = (None, "llama", "qwen3", "nemo_speechlm")
"""Of a config.json beside it (`nemo_speechlm`: of a saved SALM); for some others transformers
prefers a class of its own."""
MODEL_KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")
"""`model.type` of a tokenizer.json, as the package tokenizers knows them."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"),
    *("tekken.json", "sentencepiece.bpe.model"),
)
FETCH_AGAIN = "fetch the file again or name another tokenizer"

MAX_GROWTH = 1024
"""Characters that the steps of a tokenizer.json may make of one character."""
MAX_CONTENT = 1024
"""Characters that one Replace or Prepend step may insert at once."""
MAX_CHARACTERS = 1 << 26
"""Characters of a normalised text: each takes some 20 bytes inside the package tokenizers."""
TOKENS_PER_CHARACTER, MORE_TOKENS = 64, 1024
"""A text of n characters may give 64 n + 1,024 tokens. An honest tokenizer gives at most one per
byte of the NFKC form, 33 for U+FDFA."""
UNWATCHED_CHARACTERS = 64
"""Shorter texts need no clock: the regex engine gives up after 10 million retries, in seconds."""
PATIENCE_S, CHARACTERS_PER_S = 30, 10_000
"""A call may take 30 s, and 1 s more per 10,000 characters: 100 times what is usual."""


T = TypeVar("T")


class TokenizerError(SettingsError):
    """A tokenizer that cannot be loaded, or lacks a token that is needed."""


def is_generic(directory: Path) -> bool:
    """Whether AutoTokenizer would take its generic class for a directory, by the files in it.

    Asked beforehand because AutoTokenizer imports torch, where it is installed, to find out: most
    of the seconds that a training needs to start.
    """
    config, model = directory / "tokenizer_config.json", directory / "config.json"
    if not (directory / "tokenizer.json").is_file() or not config.is_file():
        return False
    try:
        settings = parse_json(config.read_text(encoding="utf-8"))
        kind = parse_json(model.read_text(encoding="utf-8")) if model.is_file() else {}
        return (
            settings.get("tokenizer_class") in GENERIC_CLASSES
            and "auto_map" not in settings
            and kind.get("model_type") in GENERIC_MODEL_TYPES
        )
    except (ValueError, AttributeError):  # AutoTokenizer names the problem
        return False


def load_error(name: str, path: Path, error: BaseException) -> TokenizerError:
    """One line on a tokenizer that transformers could not read, and what to do."""
    if (code := _own_code(path)) is not None:
        return TokenizerError(
            f"tokenizer {name}: needs Python code of its own ({code}), which is never run; if "
            "tokenizer.json describes all of it, remove auto_map from tokenizer_config.json and "
            "set its tokenizer_class to PreTrainedTokenizerFast, or name another tokenizer"
        )
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    file = path / "tokenizer.json"
    if file.is_file():
        problem = _json_problem(file) or f"cannot be read ({first_line}); {FETCH_AGAIN}"
        return TokenizerError(f"tokenizer {file}: {problem}")
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        return TokenizerError(
            f"tokenizer {name}: the directory has none of {', '.join(TOKENIZER_FILES)}; fetch the "
            "file that belongs to the LLM, or name another tokenizer in model.tokenizer_path"
        )
    where = "the directory" if path.is_dir() else "no such directory, and the hub"
    return TokenizerError(f"tokenizer {name}: {where} gives none ({first_line})")


def content_problem(content: bytes) -> str | None:
    """What a file is that holds no tokenizer at all, by its first bytes, and what to do."""
    if not content.strip():
        return f"the file is empty; {FETCH_AGAIN}"
    if content.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
    if content.startswith(b"# xet version"):
        return f"a Xet pointer, not the file itself; {FETCH_AGAIN}"
    if content[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return f"a web page, not the file itself; {FETCH_AGAIN}"
    return None


def _json_problem(file: Path) -> str | None:
    """What is wrong with a tokenizer.json; None if only the package tokenizers can tell."""
    try:
        content = file.read_bytes()
        if (problem := content_problem(content)) is not None:
            return problem
        spec = parse_json(content)
        kind = spec["model"].get("type", MODEL_KINDS[0])
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except SettingsError as error:
        return f"{error}; {FETCH_AGAIN}"
    except (LookupError, TypeError, AttributeError):
        return f'it has no block "model"; {FETCH_AGAIN}'
    if kind not in MODEL_KINDS:
        known = ", ".join(MODEL_KINDS)
        return f"model.type is {str(kind)[:60]!r}, expected {known}; name another tokenizer"
    return None


def _own_code(directory: Path) -> str | None:
    """The Python class that a tokenizer_config.json asks for; None if it asks for none."""
    try:
        settings = parse_json((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = settings.get("auto_map")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(named, Mapping):
        named = named.get("AutoTokenizer")
    classes = named if isinstance(named, list) else [named]
    return next((str(one) for one in classes if one), None)


_MAY_EXPAND_WHEN_LOADED = (re.compile(rb'"normalized"\s*:\s*true'), re.compile(rb"\\u00[2-7]"))
"""Added tokens go through the normaliser when the file is loaded. (The second: escaped ASCII
letters, which no writer makes, could hide the first.)"""


def check_before_loading(directory: Path) -> None:
    """Raises TokenizerError if loading alone could expand an added token without end.

    Only files with such tokens are parsed here: a large tokenizer.json costs 0.1 s to parse.
    """
    file = directory / "tokenizer.json"
    try:
        content = file.read_bytes()
        if not any(pattern.search(content) for pattern in _MAY_EXPAND_WHEN_LOADED):
            return
        spec = parse_json(content)
    except (OSError, SettingsError):
        return  # loading tells
    if isinstance(spec, dict):
        check_growth(str(file), [spec.get("normalizer"), spec.get("pre_tokenizer")])


def check_growth(file: str, parts: Sequence[object]) -> float:
    """The most characters that the parts make of one. Raises TokenizerError above MAX_GROWTH."""
    bound = _growth(step for part in parts for step in _steps(part))
    if bound > MAX_GROWTH:
        raise TokenizerError(
            f"tokenizer {file}: its Replace steps can make {min(bound, 1e18):.0f} characters of "
            f"one, at most {MAX_GROWTH} are supported; shorten them or name another tokenizer"
        )
    return bound


def _steps(part: object) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or decoder block, sequences flattened."""
    if not isinstance(part, Mapping):
        return
    inner = [part.get(k) for k in ("normalizers", "pretokenizers", "decoders")]
    if not any(inner):
        yield part
    for steps in inner:
        for step in steps if isinstance(steps, list) else ():
            yield from _steps(step)


def _growth(steps: Iterable[Mapping[str, object]]) -> float:
    r"""A bound on the characters that steps, one after the other, make of one character.

    Factors multiply only where a step can match what an earlier one wrote: " " -> "<space>" and
    "\n" -> "<newline>" make at most 9 of one, while "a" -> "aaaa" three times makes 64.
    """
    bound, written = 1.0, set[str]()
    for step in steps:
        kind, content = step.get("type"), step.get("content", step.get("prepend", ""))
        if kind in ("ByteLevel", "Precompiled"):  # 4 bytes, one character each; a table
            bound *= 4
        if kind not in ("Replace", "Prepend") or not isinstance(content, str):
            continue
        if len(content) > MAX_CONTENT:
            return float("inf")
        pattern = step.get("pattern")
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        if kind == "Replace" and content:
            if isinstance(text, str) and text:
                factor = len(content) / len(text)
                is_first = not written & set(text)
            else:  # a regex, which may match between any two characters
                factor, is_first = len(content) + 1.0, False
            bound = max(bound, factor) if is_first else bound * max(1.0, factor)
        written |= set(content)
    return bound


def _called(work: Callable[[], T], file: str) -> T:
    """Calls into the package tokenizers, whose errors are bare Exceptions and Rust panics."""
    try:
        return work()
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise TokenizerError(f"tokenizer {file}: cannot encode a text ({line})") from error


@dataclass(frozen=True, kw_only=True)
class EncodingLimits:
    """How far a tokenizer may expand a text, and how long it may take."""

    file: str
    growth: float = 1.0
    """Characters that its steps make of one, at most."""
    has_regex: bool = False
    """Whether a regex runs over each text, so that a clock must watch it."""

    @classmethod
    def of_backend(cls, backend: Any, file: str) -> "EncodingLimits":
        """Those of a Tokenizer of the package tokenizers. Raises TokenizerError as check_growth."""
        check_growth(file, [_as_json(backend.decoder)])
        parts = [_as_json(backend.normalizer), _as_json(backend.pre_tokenizer)]
        has_regex = '"Regex"' in json.dumps(parts)
        return cls(file=file, growth=check_growth(file, parts), has_regex=has_regex)

    def run(self, encode: Callable[[], T], characters: int) -> T:
        """Encodes so many characters. Raises TokenizerError if that fails or takes too long."""
        if self.growth > 1 and characters * self.growth > MAX_CHARACTERS:
            raise TokenizerError(
                f"tokenizer {self.file}: its Replace steps can make "
                f"{characters * self.growth:.0f} characters of a text of {characters}; shorten "
                "the text or name another tokenizer"
            )
        if self.has_regex and characters > UNWATCHED_CHARACTERS:
            return _within_time(encode, self.file, characters)
        return _called(encode, self.file)

    def check_count(self, tokens: Sequence[object], text: str) -> None:
        """Raises TokenizerError if a text gave far more tokens than it has characters."""
        if len(tokens) > TOKENS_PER_CHARACTER * len(text) + MORE_TOKENS:
            raise TokenizerError(
                f"tokenizer {self.file}: made {len(tokens)} tokens of {len(text)} characters, at "
                f"most {TOKENS_PER_CHARACTER} per character are supported; its normalizer or "
                "pre_tokenizer expands the text: name another tokenizer"
            )


def _as_json(step: Any) -> Any:
    """A normalizer, pre-tokenizer or decoder of the package tokenizers, as in tokenizer.json."""
    return None if step is None else json.loads(step.__getstate__())


def _within_time(encode: Callable[[], T], file: str, characters: int) -> T:
    """Runs `encode` in a thread. One that backtracks too long can't be stopped: it is left."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(_called(encode, file))
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="tokenizer")
    thread.start()
    for _ in range(max(1, round(PATIENCE_S + characters / CHARACTERS_PER_S))):
        thread.join(1.0)  # second by second, so that a stopped process loses one, not all
        if errors:
            raise errors[0]
        if results:
            return results[0]
    raise TokenizerError(
        f"tokenizer {file}: a text of {characters} characters took over {PATIENCE_S} s; its "
        "regexes backtrack too much: name another tokenizer"
    )
