"""Decodes text channels of a duplex model: one token per frame, turns between bos and eos."""

import numpy as np

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.data.tokenizer import Tokenizer


def channel_texts(
    tokens: ArrayLike, lengths: ArrayLike, tokenizer: Tokenizer, *, pad_id: int
) -> list[str]:
    """The text of each sequence of ids [B, T] up to `lengths` [B], without pad, bos and eos."""
    pairs = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [_plain(ids[:length], tokenizer, pad_id) for ids, length in pairs]


def timed_texts(
    tokens: ArrayLike,
    lengths: ArrayLike,
    tokenizer: Tokenizer,
    *,
    pad_id: int,
    frame_s: float = 0.08,
    with_ends_of_text: bool = False,
) -> list[str]:
    """The same with times in seconds: `<|start|>` of a turn, `<$end$>`, and `<end of its text>`.

    The text of a turn ends with the first pad after its bos.
    """
    texts = []
    for padded, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True):
        ids = padded[:length]
        pieces, first = [], 0
        for frame, form in _marks(ids, tokenizer, pad_id, with_ends_of_text):
            time_s = round(frame * frame_s, 3)
            pieces += [_plain(ids[first:frame], tokenizer, pad_id), form.format(time_s)]
            first = frame
        texts.append(" ".join([*pieces, _plain(ids[first:], tokenizer, pad_id)]))
    return texts


def _marks(
    ids: np.ndarray, tokenizer: Tokenizer, pad_id: int, with_ends_of_text: bool
) -> list[tuple[int, str]]:
    """(frame, format of its mark) of each mark, by frame."""
    starts = np.flatnonzero(ids == tokenizer.bos).tolist()
    ends = np.flatnonzero(ids == tokenizer.eos).tolist()
    marks = [(frame, "<|{}|>") for frame in starts] + [(frame, "<${}$>") for frame in ends]
    if with_ends_of_text:
        for start in starts:
            end = next((end for end in ends if end > start), len(ids))
            pads = np.flatnonzero(ids[start:end] == pad_id)
            marks += [(start + int(pad), "<{}>") for pad in pads[:1]]
    return sorted(marks, key=lambda mark: mark[0])


def _plain(ids: np.ndarray, tokenizer: Tokenizer, pad_id: int) -> str:
    silent = [i for i in (pad_id, tokenizer.bos, tokenizer.eos) if i is not None]
    return tokenizer.ids_to_text(ids[~np.isin(ids, silent)])
