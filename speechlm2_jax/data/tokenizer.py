"""Text <-> token ids, over Hugging Face tokenizers and SentencePiece models, by NeMo's names."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from speechlm2_jax.data.tokenizer_contents import contents_of_files, contents_of_model
from speechlm2_jax.data.tokenizer_file import (
    EncodingLimits,
    TokenizerError,
    check_before_loading,
    content_problem,
    is_generic,
    load_error,
)

__all__ = ["Tokenizer", "TokenizerError"]

SPECIAL_NAMES = ("bos", "eos", "pad", "unk")

log = logging.getLogger(__name__)


class _Backend(Protocol):
    """What Tokenizer needs of a library."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def tokens(self, text: str) -> list[str]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def join(self, tokens: list[str]) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, index: int) -> str: ...
    def special_token(self, name: str) -> str | None: ...
    def add(self, tokens: Sequence[str], names: Mapping[str, str]) -> int: ...
    def save(self, directory: str | Path) -> None: ...
    def serialized(self) -> bytes: ...
    def contents(self) -> str | None: ...
    def __len__(self) -> int: ...


class Tokenizer:
    """Text <-> ids, never adding begin or end tokens by itself.

    Args:
        name_or_path: a directory as `save_pretrained` of transformers writes it, a name on the hub,
            or a SentencePiece `.model` file.

    Raises TokenizerError if there is no tokenizer to be read.
    """

    def __init__(self, name_or_path: str | Path) -> None:
        self.name = str(name_or_path)
        if Path(self.name).suffix == ".model":
            self._backend: _Backend = _SentencePiece.from_file(self.name)
        else:
            self._backend = _HuggingFace(self.name)

    @classmethod
    def from_sentencepiece(cls, model: bytes, name: str = "tokenizer.model") -> "Tokenizer":
        """Makes one of the content of a SentencePiece model, out of an archive for instance."""
        tokenizer = cls.__new__(cls)
        tokenizer.name, tokenizer._backend = name, _SentencePiece(model, name)
        return tokenizer

    def __len__(self) -> int:
        return len(self._backend)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {len(self)} tokens)"

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self)

    def text_to_ids(self, text: str) -> list[int]:
        """Encodes one text."""
        return self._backend.encode([text])[0]

    def texts_to_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts at once, equal ones only once: much faster than one by one."""
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self._backend.encode(distinct), strict=True)) if distinct else {}
        return [list(ids[text]) for text in texts]

    def ids_to_text(self, ids: Any, remove_special_tokens: bool = True) -> str:
        """Decodes `[T]` ids: a list, or any array (NumPy, JAX, torch)."""
        flat = np.asarray(ids)
        if flat.ndim > 1:
            raise ValueError(
                f"ids must be 1-D, got shape {flat.shape}; decode each sequence on its own"
            )
        return self._backend.decode(flat.reshape(-1).astype(int).tolist(), remove_special_tokens)

    def text_to_tokens(self, text: str) -> list[str]:
        """Encodes one text to token strings."""
        return self._backend.tokens(text)

    def tokens_to_text(self, tokens: Sequence[str]) -> str:
        """Joins token strings to text."""
        return self._backend.join(list(tokens))

    def tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Looks tokens up; an unknown one gives the unknown id, or None where there is none."""
        return [self.token_to_id(token) for token in tokens]

    def ids_to_tokens(self, ids: Any) -> list[str]:
        """The token string of each id."""
        return [self._backend.id_to_token(int(i)) for i in np.asarray(ids).reshape(-1)]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token; an unknown one gives the unknown id, or None where there is none."""
        found = self._backend.token_to_id(token)
        return self.unk_id if found is None else found

    def require(self, token: str, why: str) -> int:
        """The id of a token that must be there. Raises TokenizerError naming both if it is not."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"{why} needs the token {token!r}, which tokenizer {self.name} lacks"
            )
        return found

    def add_special_tokens(self, tokens: Mapping[str, Any] | Sequence[str]) -> int:
        """Adds tokens that are never split, with ids from len(tokenizer) on.

        Takes a list of them, or a mapping like transformers': `bos_token`, `eos_token`,
        `pad_token`, `unk_token`, `additional_special_tokens`. Gives the number of new tokens.
        """
        if not isinstance(tokens, Mapping):
            return self._backend.add(list(tokens), {})
        names = {k: v for k, v in tokens.items() if k != "additional_special_tokens"}
        unknown = set(names) - {f"{name}_token" for name in SPECIAL_NAMES}
        if unknown:
            raise ValueError(f"no such special token: {', '.join(sorted(unknown))}")
        return self._backend.add(list(tokens.get("additional_special_tokens", ())), names)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer, added tokens included, into a directory."""
        self._backend.save(directory)

    def serialized(self) -> bytes:
        """The SentencePiece model that it was made of. Raises TokenizerError for another kind."""
        return self._backend.serialized()

    @property
    def contents(self) -> str | None:
        """A checksum of the files that decide its ids, without tokens added here; None: no files.

        Equal files give equal ones, whatever their path.
        """
        return self._backend.contents()

    @property
    def bos_token(self) -> str | None:
        """Begin of sequence, or None."""
        return self._backend.special_token("bos")

    @property
    def eos_token(self) -> str | None:
        """End of sequence, or None."""
        return self._backend.special_token("eos")

    @property
    def pad_token(self) -> str | None:
        """Padding, or None; `pad_id` always has a value."""
        return self._backend.special_token("pad")

    @property
    def unk_token(self) -> str | None:
        """Unknown, or None."""
        return self._backend.special_token("unk")

    @property
    def bos_id(self) -> int | None:
        """Id of begin of sequence, or None."""
        return self._special_id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of end of sequence, or None."""
        return self._special_id("eos")

    @property
    def unk_id(self) -> int | None:
        """Id of unknown, or None."""
        return self._special_id("unk")

    @property
    def pad_id(self) -> int:
        """Id that pads: the padding token's, else the unknown token's, else 0 after a warning."""
        for name in ("pad", "unk"):
            found = self._special_id(name)
            if found is not None:
                return found
        _warn_of_no_pad(self.name)
        return 0

    bos, eos, pad, unk = bos_id, eos_id, pad_id, unk_id

    def _special_id(self, name: str) -> int | None:
        token = self._backend.special_token(name)
        return None if token is None else self._backend.token_to_id(token)


@cache
def _warn_of_no_pad(name: str) -> None:
    """Warns once per tokenizer."""
    log.warning(
        "tokenizer %s: it has neither a pad token nor an unk token, so the token of id 0 pads; set "
        "pad_token in its tokenizer_config.json if that token occurs in texts",
        name,
    )


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
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            # transformers' own call spends most of its time on what is not asked for here
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encoded]
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

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
