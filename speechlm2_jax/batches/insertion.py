"""Texts that are put after the clips of a batch, once its arrays exist."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from speechlm2_jax.batches.salm import PER_TOKEN, SalmBatch

ClipTexts = Sequence[Sequence[np.ndarray]]
"""Token ids [L] of the text of each clip, by group and clip."""


def insert_after_clips(
    batch: SalmBatch[np.ndarray], texts: ClipTexts, *, frames: int, size: Callable[[int], int]
) -> SalmBatch[np.ndarray]:
    """Puts a text after the last frame of each clip that a sequence holds.

    `frames` is the size of the time axis that `audio_index` counts clips in. `size` gives the new
    length of the arrays for that of the longest sequence. Nothing of a text is scored, and its last
    token predicts what the last frame predicted.
    """
    rows = [
        [_inserted(_row(batch, g, r), own, frames) for r in range(batch.tokens.shape[1])]
        for g, own in enumerate(texts)
    ]
    longest = max((len(row["tokens"]) for group in rows for row in group), default=0)
    length = size(longest)
    arrays: dict[str, np.ndarray] = {}
    for name in PER_TOKEN:
        old = np.asarray(getattr(batch, name))
        filling = -1 if name == "audio_index" else 0
        arrays[name] = np.full((*old.shape[:2], length), filling, old.dtype)
        for g, group in enumerate(rows):
            for r, row in enumerate(group):
                arrays[name][g, r, : len(row[name])] = row[name]
    return replace(batch, **arrays)


def _row(batch: SalmBatch[np.ndarray], group: int, sequence: int) -> dict[str, np.ndarray]:
    """The fields of one sequence, without its padding."""
    length = int((batch.segments[group, sequence] > 0).sum())
    return {name: np.asarray(getattr(batch, name)[group, sequence, :length]) for name in PER_TOKEN}


def _inserted(
    row: Mapping[str, np.ndarray], texts: Sequence[np.ndarray], frames: int
) -> Mapping[str, np.ndarray]:
    """A sequence with the texts after its clips."""
    count = len(row["tokens"])
    is_audio = row["audio_index"] >= 0
    if not is_audio.any():
        return row
    clip: list[int] = np.where(is_audio, row["audio_index"] // max(frames, 1), -1).tolist()
    ends = [i for i in range(count) if clip[i] >= 0 and [clip[i]] != clip[i + 1 : i + 2]]
    own = [texts[clip[end]] for end in ends]
    repeats = np.ones(count, np.int64)
    repeats[ends] += [len(text) for text in own]
    source = np.repeat(np.arange(count), repeats)
    starts = np.cumsum(repeats) - repeats
    is_text = np.ones(len(source), bool)
    is_text[starts] = False
    is_last = np.append(source[1:] != source[:-1], True)
    made = {name: values[source] for name, values in row.items()}
    made["tokens"][is_text] = np.concatenate(own)
    made["audio_index"][is_text] = -1
    made["attention_mask"][is_text] = True
    made["targets"] = np.where(is_last, made["targets"], 0).astype(row["targets"].dtype)
    made["loss_mask"] = made["loss_mask"] & is_last
    first = starts[np.arange(count) - row["positions"]]  # of each token's conversation
    made["positions"] = (np.arange(len(source)) - first[source]).astype(row["positions"].dtype)
    return made


def follow_placeholders(
    tokens: np.ndarray, placeholder_id: int, texts: Sequence[np.ndarray]
) -> np.ndarray:
    """Puts a text after each placeholder of a conversation [L], whose clips they belong to.

    Raises ValueError if there are not as many texts as placeholders.
    """
    places = np.flatnonzero(tokens == placeholder_id)
    if len(places) != len(texts):
        raise ValueError(f"{len(texts)} texts for {len(places)} audio placeholders")
    pieces = np.split(tokens, places + 1)
    with_texts = [x for pair in zip(pieces, [*texts, tokens[:0]], strict=True) for x in pair]
    return np.concatenate(with_texts).astype(tokens.dtype)
