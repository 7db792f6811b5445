"""What reads tokenizer files: transformers, or SentencePiece for a `.model` file."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from speechlm2_jax.data.tokenizer_contents import contents_of_files, contents_of_model
from speechlm2_jax.data.tokenizer_file import (
    EncodingLimits,
    TokenizerError,
    check_before_loading,
    content_problem,
    is_generic,
    load_error,
)
from speechlm2_jax.data.word_counts import has_separate_words

SPECIAL_NAMES = ("bos", "eos", "pad", "unk")
Encoded = tuple[list[int], list[tuple[int, int]]]
"""(ids, for each the first character that it stands for and the one after the last)."""


class Backend(Protocol):
    """What Tokenizer needs of a library."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without tokens around it."""
        ...

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        """The same, with the characters of each id."""
        ...

    def encode_with_places(
        self, texts: Sequence[str], spans: Sequence[tuple[int, int]]
    ) -> list[tuple[list[int], int]]:
        """Ids of each text, and the index of the first one in its span of characters [begin, end).

        Without any id in it the index is the number of ids.
        """
        ...

    def tokens_of_separate_words(self) -> dict[str, int] | None:
        """The ids of tokens that are never split, if words can be encoded apart; else None."""
        ...

    def chat_template(self) -> str | None:
        """See `Tokenizer.chat_template`."""
        ...

    def special_tokens(self) -> dict[str, str]:
        """See `Tokenizer.special_tokens`."""
        ...

    def added_tokens(self) -> list[str]:
        """See `Tokenizer.added_tokens`."""
        ...

    def tokens(self, text: str) -> list[str]:
        """The token strings of a text."""
        ...

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """The text of ids."""
        ...

    def join(self, tokens: list[str]) -> str:
        """The text of token strings."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if unknown."""
        ...

    def id_to_token(self, index: int) -> str:
        """The token string of an id."""
        ...

    def special_token(self, name: str) -> str | None:
        """The token string of "bos", "eos", "pad" or "unk"."""
        ...

    def add(self, tokens: Sequence[str], names: Mapping[str, str]) -> int:
        """Adds tokens that are never split (`names`: "bos_token", ...); tells how many are new."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the files."""
        ...

    def serialized(self) -> bytes:
        """The SentencePiece model that it was made of."""
        ...

    def contents(self) -> str | None:
        """See `Tokenizer.contents`."""
        ...

    def __len__(self) -> int: ...


def open_backend(name: str) -> Backend:
    """Reads a directory, a name on the hub, or a `.model` file. Raises TokenizerError."""
    return _SentencePiece.from_file(name) if Path(name).suffix == ".model" else _HuggingFace(name)


def of_model(content: bytes, name: str) -> Backend:
    """Reads the content of a SentencePiece model. Raises TokenizerError."""
    return _SentencePiece(content, name)


class _HuggingFace:
    """A tokenizer of transformers. Code in a repository is never run."""

    def __init__(self, name: str) -> None:
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local and not Path(name).expanduser().is_dir():
            raise TokenizerError(f"tokenizer {name}: no such directory")
        self._path = path = Path(name).expanduser()
        file = f"{name}/tokenizer.json"
        check_before_loading(path)
        if is_generic(path):
            from transformers import PreTrainedTokenizerFast as Reader
        else:
            from transformers import AutoTokenizer as Reader
        try:
            self._tokenizer = Reader.from_pretrained(
                str(path) if path.is_dir() else name, trust_remote_code=False
            )
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # tokenizers raises bare Exceptions and Rust panics
            raise load_error(name, path, error) from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self._limits = EncodingLimits(file=file)
        if backend is not None:
            self._limits = EncodingLimits.of_backend(backend, file)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        characters = sum(map(len, texts))
        ids = self._limits.run(lambda: self._encode(texts), characters)
        for sequence, text in zip(ids, texts, strict=True):
            self._limits.check_count(sequence, text)
        return ids

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if (backend := self._plain_backend()) is not None:
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encoded]
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(
                f"tokenizer {self._limits.file}: no such file, which a chat template needs to find "
                "the responses; set prompt_format to a format by its name"
            )
        characters = sum(map(len, texts))
        encoded = self._limits.run(lambda: self._encode_with_offsets(texts), characters)
        for (ids, _), text in zip(encoded, texts, strict=True):
            self._limits.check_count(ids, text)
        return encoded

    def encode_with_places(
        self, texts: Sequence[str], spans: Sequence[tuple[int, int]]
    ) -> list[tuple[list[int], int]]:
        if (backend := self._plain_backend()) is None:
            encoded = self.encode_with_offsets(texts)
            pairs = zip(encoded, spans, strict=True)
            return [(ids, _first_in(offsets, span)) for (ids, offsets), span in pairs]
        found = self._limits.run(
            lambda: [
                (encoding.ids, _place(encoding, span))
                for encoding, span in zip(
                    backend.encode_batch(list(texts), add_special_tokens=False), spans, strict=True
                )
            ],
            sum(map(len, texts)),
        )
        for (ids, _), text in zip(found, texts, strict=True):
            self._limits.check_count(ids, text)
        return found

    def _encode_with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        if not texts:
            return []
        if (backend := self._plain_backend()) is not None:
            encoded = backend.encode_batch(list(texts), add_special_tokens=False)
            return [(encoding.ids, encoding.offsets) for encoding in encoded]
        # transformers' own call, because a file may ask for truncation, which this turns off
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _plain_backend(self) -> Any:
        """The tokenizer of the package tokenizers, if its file asks for no truncation or padding.

        transformers' own call, which turns these off, spends most of its time on other things.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        is_plain = backend is not None and backend.truncation is None and backend.padding is None
        return backend if is_plain else None

    def tokens_of_separate_words(self) -> dict[str, int] | None:
        if (backend := self._plain_backend()) is None or not has_separate_words(backend):
            return None
        return {one.content: n for n, one in backend.get_added_tokens_decoder().items()}

    def chat_template(self) -> str | None:
        found = self._tokenizer.chat_template
        return found.get("default") if isinstance(found, dict) else found

    def special_tokens(self) -> dict[str, str]:
        return dict(self._tokenizer.special_tokens_map)

    def added_tokens(self) -> list[str]:
        return [str(token) for token in self._tokenizer.added_tokens_decoder.values()]

    def tokens(self, text: str) -> list[str]:
        found = self._limits.run(lambda: self._tokenizer.tokenize(text), len(text))
        self._limits.check_count(found, text)
        return found

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def join(self, tokens: list[str]) -> str:
        return self._tokenizer.convert_tokens_to_string(tokens)

    def token_to_id(self, token: str) -> int | None:
        found = self._tokenizer.convert_tokens_to_ids(token)
        is_unknown = found == self._tokenizer.unk_token_id and token != self._tokenizer.unk_token
        return None if is_unknown else found

    def id_to_token(self, index: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(index) or ""  # rows beyond the tokens

    def special_token(self, name: str) -> str | None:
        return getattr(self._tokenizer, f"{name}_token")

    def add(self, tokens: Sequence[str], names: Mapping[str, str]) -> int:
        before = len(self._tokenizer)
        if names:
            self._tokenizer.add_special_tokens(dict(names))
        self._tokenizer.add_tokens(list(tokens), special_tokens=True)
        return len(self._tokenizer) - before

    def save(self, directory: str | Path) -> None:
        self._tokenizer.save_pretrained(str(directory))

    def serialized(self) -> bytes:
        raise TokenizerError("this tokenizer is of transformers; it has no SentencePiece model")

    def contents(self) -> str | None:
        return contents_of_files(self._path)

    def __len__(self) -> int:
        return len(self._tokenizer)


def _first_in(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> int:
    """The first token of those with these characters that has one of a span."""
    begin, end = span
    found = (n for n, (first, after) in enumerate(offsets) if after > begin and first < end)
    return next(found, len(offsets))


def _place(encoding: Any, span: tuple[int, int]) -> int:
    """The same of an encoding of the package tokenizers, without all its offsets."""
    found = encoding.char_to_token(span[0]) if span[0] < span[1] else None
    return _first_in(encoding.offsets, span) if found is None else found


class _SentencePiece:
    """A SentencePiece model, with added special tokens after its own pieces."""

    def __init__(self, content: bytes, name: str) -> None:
        from sentencepiece import SentencePieceProcessor

        if (problem := content_problem(content)) is not None:
            raise TokenizerError(f"tokenizer {name}: {problem}")
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"tokenizer {name}: not a SentencePiece model") from error
        self._limits, self._content = EncodingLimits(file=name), content
        self._added: dict[str, int] = {}
        ids = {n: getattr(self._model, f"{n}_id")() for n in SPECIAL_NAMES}
        self._named = {n: self._model.id_to_piece(i) for n, i in ids.items() if i >= 0}

    @classmethod
    def from_file(cls, path: str) -> "_SentencePiece":
        if not Path(path).is_file():
            raise TokenizerError(f"tokenizer {path}: no such file")
        return cls(Path(path).read_bytes(), path)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._ids(text)) for text in texts]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        raise TokenizerError("a SentencePiece model does not tell the characters of its tokens")

    def encode_with_places(
        self, texts: Sequence[str], spans: Sequence[tuple[int, int]]
    ) -> list[tuple[list[int], int]]:
        raise TokenizerError("a SentencePiece model does not tell the characters of its tokens")

    def tokens_of_separate_words(self) -> None:
        return None  # a piece of the model may reach over a space

    def chat_template(self) -> str | None:
        return None

    def special_tokens(self) -> dict[str, str]:
        return {f"{name}_token": token for name, token in self._named.items()}

    def added_tokens(self) -> list[str]:
        return list(self._added)

    def _ids(self, text: str) -> Iterable[int]:
        for part in self._split(text):
            if part in self._added:
                yield self._added[part]
            else:
                ids = self._model.encode(part)
                self._limits.check_count(ids, part)
                yield from ids

    def _split(self, text: str) -> list[str]:
        if not self._added:
            return [text]
        pattern = "|".join(re.escape(t) for t in sorted(self._added, key=len, reverse=True))
        return [part for part in re.split(f"({pattern})", text) if part]

    def tokens(self, text: str) -> list[str]:
        return [self.id_to_token(i) for i in self._ids(text)]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        tokens = [self.id_to_token(i) for i in ids]
        special = {*self._added, *self._named.values()} if skip_special else set()
        return self.join([t for t in tokens if t not in special])

    def join(self, tokens: list[str]) -> str:
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token not in self._added:
                run.append(token)
                continue
            text += (self._model.decode_pieces(run) if run else "") + (token or "")
            run = []
        return text

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def id_to_token(self, index: int) -> str:
        pieces = self._model.get_piece_size()
        if index < pieces:
            return self._model.id_to_piece(index)
        return list(self._added)[index - pieces]

    def special_token(self, name: str) -> str | None:
        return self._named.get(name)

    def add(self, tokens: Sequence[str], names: Mapping[str, str]) -> int:
        before = len(self)
        for token in [*names.values(), *tokens]:
            if self.token_to_id(token) is None:
                self._added[token] = len(self)
        self._named |= {name.removesuffix("_token"): token for name, token in names.items()}
        return len(self) - before

    def save(self, directory: str | Path) -> None:
        target = Path(directory) / "tokenizer.model"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self._content)

    def serialized(self) -> bytes:
        return self._content

    def contents(self) -> str | None:
        return contents_of_model(self._content)

    def __len__(self) -> int:
        return self._model.get_piece_size() + len(self._added)
