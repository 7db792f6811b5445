"""Text <-> token ids, over Hugging Face tokenizers and SentencePiece models, by NeMo's names."""

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechlm2_jax.data.tokenizer_backends import (
    SPECIAL_NAMES,
    Encoded,
    of_model,
    open_backend,
)
from speechlm2_jax.data.tokenizer_file import TokenizerError
from speechlm2_jax.data.word_counts import TokenCount, WordCounter

if TYPE_CHECKING:  # it imports jax: 0.6 s, for which lists of recordings need not wait
    from speechlm2_jax.arrays import ArrayLike

__all__ = ["Tokenizer", "TokenizerError"]

log = logging.getLogger(__name__)


class Tokenizer:
    """Text <-> ids, never adding begin or end tokens by itself.

    Args:
        name_or_path: a directory as `save_pretrained` of transformers writes it, a name on the hub,
            or a SentencePiece `.model` file.

    Raises TokenizerError if there is no tokenizer to be read.
    """

    _rows: int | None = None
    _placeholders: frozenset[int] = frozenset()
    _counter: tuple[int, WordCounter | None] | None = None
    """Of the id that was counted last."""

    def __init__(self, name_or_path: str | Path) -> None:
        self.name = str(name_or_path)
        self._backend = open_backend(self.name)

    @classmethod
    def from_sentencepiece(cls, model: bytes, name: str = "tokenizer.model") -> "Tokenizer":
        """Makes one of the content of a SentencePiece model, out of an archive for instance."""
        tokenizer = cls.__new__(cls)
        tokenizer.name, tokenizer._backend = name, of_model(model, name)
        return tokenizer

    def __len__(self) -> int:
        return len(self._backend)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {len(self)} tokens)"

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self)

    def limit_ids(self, rows: int, placeholders: Sequence[int] = ()) -> None:
        """From now on, texts with ids beyond the `rows` of an LLM's embedding are errors.

        A lookup beyond the table would give NaN. `placeholders` are ids that are never looked up.
        """
        self._rows, self._placeholders, self._counter = rows, frozenset(placeholders), None

    def _in_table(self, ids: list[int]) -> list[int]:
        """Returns the ids. Raises TokenizerError if the LLM has no embedding for one."""
        if self._rows is None or max(ids, default=0) < self._rows:
            return ids
        beyond = {i for i in ids if i >= self._rows} - self._placeholders
        if beyond:
            token = min(beyond)
            raise TokenizerError(
                f"tokenizer {self.name}: a text has the token {self.ids_to_tokens([token])[0]!r} "
                f"of id {token}, but the LLM's embedding has {self._rows} rows; use the LLM's own "
                "tokenizer, or resize the LLM (transformers: resize_token_embeddings(len(tokenizer)"
                ")) and save it again"
            )
        return ids

    def text_to_ids(self, text: str) -> list[int]:
        """Encodes one text."""
        return self._in_table(self._backend.encode([text])[0])

    def texts_to_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts at once, equal ones only once: much faster than one by one."""
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self._backend.encode(distinct), strict=True)) if distinct else {}
        for found in ids.values():
            self._in_table(found)
        return [list(ids[text]) for text in texts]

    def texts_with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        """Encodes texts, with the characters [begin, end) that each id stands for.

        Raises TokenizerError for a tokenizer whose library does not tell them.
        """
        encoded = self._backend.encode_with_offsets(texts)
        for ids, _ in encoded:
            self._in_table(ids)
        return encoded

    def count(
        self, texts: Sequence[str], wanted: int, spans: Sequence[tuple[int, int]] | None = None
    ) -> list[TokenCount]:
        """Counts the tokens of texts, and those of a `wanted` id, in less time than encoding takes.

        With spans of characters [begin, end), also tells the first token that is in each; that
        raises TokenizerError as `texts_with_offsets` does.
        """
        counter = self._counter_of(wanted)
        if counter is not None:
            return counter.count(texts, spans or [(len(text), len(text)) for text in texts])
        if spans is None:
            return [
                TokenCount(len(ids), ids.count(wanted), len(ids))
                for ids in self.texts_to_ids(texts)
            ]
        encoded = self._backend.encode_with_places(texts, spans)
        return [TokenCount(len(ids), ids.count(wanted), place) for ids, place in encoded]

    def _counter_of(self, wanted: int) -> WordCounter | None:
        """What counts word by word; None for a tokenizer whose words depend on one another."""
        if self._counter is None or self._counter[0] != wanted:
            added, counter = self._backend.tokens_of_separate_words(), None
            if added is not None:
                places = self._backend.encode_with_places
                counter = WordCounter(self._encode, places, added, wanted)
            self._counter = wanted, counter
        return self._counter[1]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._in_table(ids) for ids in self._backend.encode(texts)]

    def __getstate__(self) -> dict[str, Any]:
        """Without what it remembers of words."""
        return {**self.__dict__, "_counter": None}

    def ids_to_text(self, ids: "ArrayLike", remove_special_tokens: bool = True) -> str:
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

    def ids_to_tokens(self, ids: "ArrayLike") -> list[str]:
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
        self._counter = None
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
    def chat_template(self) -> str | None:
        """The Jinja template that writes its dialogs, or None."""
        return self._backend.chat_template()

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ...: the tokens that it has, as a chat template sees them."""
        return self._backend.special_tokens()

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that are never split: those of its files and those added here."""
        return self._backend.added_tokens()

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
