"""A checksum of what a tokenizer's files say about token ids: has it been edited in place?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

_FAST = "tokenizer.json"
_VOCABULARIES = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
"""Read by transformers where there is no tokenizer.json."""
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NO_IDS = frozenset(
    {
        # of tokenizer.json: special tokens around a text are never added here, and text is decoded
        *("version", "truncation", "padding", "post_processor", "decoder"),
        # of tokenizer_config.json
        *("chat_template", "model_max_length", "padding_side", "truncation_side", "tokenizer_file"),
        *("clean_up_tokenization_spaces", "name_or_path", "add_bos_token", "add_eos_token"),
        *("model_input_names", "processor_class", "transformers_version", "is_local", "backend"),
    }
)
"""Keys that change no id of a text."""


def contents_of_files(folder: Path) -> str | None:
    """The xxh3_128, in hex, of what decides ids in a tokenizer's folder; None without such files.

    Layout, order of keys and keys that change no id (a chat template) have no influence.
    """
    checksum, is_found = xxhash.xxh3_128(), False
    for name, content in _parts(folder):
        checksum.update(f"{name} {len(content)}\n".encode())
        checksum.update(content)
        is_found = True
    return checksum.hexdigest() if is_found else None


def contents_of_model(content: bytes) -> str:
    """The same of a SentencePiece model."""
    return xxhash.xxh3_128_hexdigest(content)


def _parts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What decides ids in each file, by name."""
    fast = (_FAST,) if (folder / _FAST).is_file() else _VOCABULARIES
    for name in (*fast, *_SETTINGS):
        try:
            content = (folder / name).read_bytes()
        except OSError:
            continue
        yield name, _in_one_form(content) if name.endswith(".json") else content


def _in_one_form(content: bytes) -> bytes:
    try:
        values = json.loads(content)
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key not in _NO_IDS}
            model = values.get("model")
            if isinstance(model, dict) and isinstance(model.get("merges"), list):
                values["model"] = {**model, "merges": [_as_pair(m) for m in model["merges"]]}
        return json.dumps(values, sort_keys=True).encode()
    except (ValueError, RecursionError):
        return content


def _as_pair(merge: object) -> Any:
    """A merge as newer versions of the package tokenizers write it: `["a", "b"]`, not "a b"."""
    return merge.split(" ") if isinstance(merge, str) else merge
