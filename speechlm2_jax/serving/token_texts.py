"""The text and the bytes of each token of a response, as chat completions tell them."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from jaxtyping import Int

from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference.text_stream import BYTE, GrowingText


def token_bytes(tokenizer: Tokenizer, ids: Int[np.ndarray, " T"]) -> list[bytes]:
    """The bytes of the text that each token adds; joined, they are the UTF-8 of the whole text.

    A special token adds none. Tokens that are parts of one character have its bytes by their
    spelling: one byte for each character in byte-level BPE, one for `<0xE2>` in SentencePiece.
    """
    growing, found, text = GrowingText(tokenizer), [], ""
    for count in range(1, len(ids) + 1):
        is_last = count == len(ids)
        text += growing.add(ids[:count], is_last)
        if not is_last and tokenizer.ids_to_text(ids[:count]) != growing.text:
            continue  # within a character
        spellings = tokenizer.ids_to_tokens(ids[len(found) : count])
        found += _divided(text.encode(), [_byte_count(one) for one in spellings])
        text = ""
    return found


def shown_token(data: bytes, spelling: str) -> str:
    r"""A token as a text: parts of a character as `bytes:\xe2`, a special token as it is spelt."""
    if not data:
        return spelling
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{one:02x}" for one in data)


def _byte_count(spelling: str) -> int:
    return 1 if BYTE.fullmatch(spelling) else len(spelling)


def _divided(data: bytes, counts: Sequence[int]) -> list[bytes]:
    """Bytes divided among tokens by their counts; the last one has all that is left."""
    ends = [*list(accumulate(counts))[:-1], len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
