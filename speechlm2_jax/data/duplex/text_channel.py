"""What a text channel of a duplex model says: one token per frame, turns between bos and eos."""

from typing import Any

import numpy as np

from speechlm2_jax.data.tokenizer import Tokenizer


def channel_texts(tokens: Any, lengths: Any, tokenizer: Tokenizer, *, pad_id: int) -> list[str]:
    """The text of each row of ids [B, T] up to `lengths` [B], without pad, bos and eos."""
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [_plain(row[:count], tokenizer, pad_id) for row, count in rows]


def timed_texts(
    tokens: Any,
    lengths: Any,
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
    for row, count in zip(np.asarray(tokens), np.asarray(lengths), strict=True):
        row = row[:count]
        parts, first = [], 0
        for frame, form in _marks(row, tokenizer, pad_id, with_ends_of_text):
            time_s = round(frame * frame_s, 3)
            parts += [_plain(row[first:frame], tokenizer, pad_id), form.format(time_s)]
            first = frame
        texts.append(" ".join([*parts, _plain(row[first:], tokenizer, pad_id)]))
    return texts


def _marks(
    row: np.ndarray, tokenizer: Tokenizer, pad_id: int, with_ends_of_text: bool
) -> list[tuple[int, str]]:
    """Frames that are to be marked, in order, and how."""
    starts = np.flatnonzero(row == tokenizer.bos).tolist()
    ends = np.flatnonzero(row == tokenizer.eos).tolist()
    marks = [(frame, "<|{}|>") for frame in starts] + [(frame, "<${}$>") for frame in ends]
    if with_ends_of_text:
        for start in starts:
            end = next((end for end in ends if end > start), len(row))
            pads = np.flatnonzero(row[start:end] == pad_id)
            marks += [(start + int(pad), "<{}>") for pad in pads[:1]]
    return sorted(marks, key=lambda mark: mark[0])


def _plain(ids: np.ndarray, tokenizer: Tokenizer, pad_id: int) -> str:
    silent = [i for i in (pad_id, tokenizer.bos, tokenizer.eos) if i is not None]
    return tokenizer.ids_to_text(ids[~np.isin(ids, silent)])
