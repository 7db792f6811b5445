"""Texts put after clips, in arrays and in conversations, give the same sequences."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from speechlm2_jax.batches import (
    BatchShape,
    SalmBatch,
    SalmExample,
    assemble_salm_batch,
    follow_placeholders,
    insert_after_clips,
)
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.transcripts import with_transcripts
from speechlm2_jax.models.salm_asr_decoder import grown_length

TAG, FRAME = 99, 10
SHAPE = BatchShape(sequences=3, tokens=20, clips=4, samples=60)


def frame_count(samples: int) -> int:
    return samples // FRAME


def example(tokens: list[int], clips: tuple[int, ...], scored: int) -> SalmExample:
    """A conversation whose last `scored` tokens are trained."""
    ids = np.array(tokens, np.int32)
    mask = np.arange(len(ids)) >= len(ids) - scored
    return SalmExample(
        id="x",
        tokens=ids,
        loss_mask=mask & (ids != TAG),
        audio=tuple(np.ones(n, np.float32) for n in clips),
    )


EXAMPLES = [
    example([1, TAG, 2, 3, 4], (30,), 2),
    example([TAG, TAG, 5, TAG, 6, 7], (10, 20, 40), 3),  # the token after a clip is trained
    example([8, 9, 10], (), 1),
]
TEXTS = [np.array(ids, np.int32) for ids in ([11, 12], [13], [], [14, 15, 16])]


def assembled(examples: list[SalmExample], tokens: int = SHAPE.tokens) -> SalmBatch:
    return assemble_salm_batch(
        [examples], replace(SHAPE, tokens=tokens), frame_count=frame_count, placeholder_id=TAG
    )


def in_conversations() -> list[SalmExample]:
    texts, completed = iter(TEXTS), []
    for given in EXAMPLES:
        own = [next(texts) for _ in given.audio]
        ids = follow_placeholders(given.tokens, TAG, own)
        mask = follow_placeholders(
            np.where(given.tokens == TAG, TAG, given.loss_mask), TAG, [0 * text for text in own]
        )
        completed.append(replace(given, tokens=ids, loss_mask=mask == 1))
    return completed


def insert(batch: SalmBatch, size: int) -> SalmBatch:
    frames = frame_count(SHAPE.samples)
    return insert_after_clips(batch, [TEXTS], frames=frames, size=lambda _: size)


def test_both_ways_give_the_same_batch():
    got, expected = insert(assembled(EXAMPLES), 24), assembled(in_conversations(), 24)
    for name, want in vars(expected).items():
        np.testing.assert_array_equal(getattr(got, name), want, err_msg=name)
        assert np.asarray(getattr(got, name)).dtype == np.asarray(want).dtype


def test_a_text_takes_over_the_target_of_the_last_frame():
    batch = insert(assembled(EXAMPLES), 24)
    row = batch.map(lambda x: x[0, 1] if x.ndim > 2 else x)
    assert row.tokens[:11].tolist() == [0, 13, 0, 0, 5, 0, 0, 0, 0, 14, 15]
    assert row.targets[8] == 0 and not row.loss_mask[8]  # the last frame
    assert row.tokens[11] == 16 and row.targets[11] == 6 and row.loss_mask[11]
    assert row.audio_index[9] == -1 and row.attention_mask[9] and row.segments[9] == 1


def test_packed_conversations_stay_apart():
    """Two conversations in one sequence, as packing lays them out."""
    one = assembled(EXAMPLES)
    lengths = (one.segments[0] > 0).sum(axis=-1)
    a, b, frames = int(lengths[0]), int(lengths[1]), frame_count(SHAPE.samples)

    def packed(batch: SalmBatch, a: int, b: int, size: int) -> SalmBatch:
        def pack(values: np.ndarray) -> np.ndarray:
            if values.ndim < 3 or values.dtype == np.float32:
                return values
            row = np.zeros((1, 1, size), values.dtype)
            row[0, 0, : a + b] = np.concatenate([values[0, 0, :a], values[0, 1, :b]])
            return row

        made = batch.map(pack)
        made.segments[0, 0, a : a + b] = 2
        return made

    got = insert_after_clips(packed(one, a, b, 40), [TEXTS], frames=frames, size=lambda _: 40)
    whole = insert(one, 24)
    n = [int(x) for x in (whole.segments[0] > 0).sum(axis=-1)]
    expected = packed(whole, n[0], n[1], 40)
    for name in ("tokens", "positions", "segments", "targets", "loss_mask", "attention_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


def test_the_length_follows_the_longest_sequence():
    asked: list[int] = []

    def size(longest: int) -> int:
        asked.append(longest)
        return longest

    batch = insert_after_clips(
        assembled(EXAMPLES), [TEXTS], frames=frame_count(SHAPE.samples), size=size
    )
    assert asked == [batch.tokens.shape[2]] == [max(len(e.tokens) for e in _expanded()) - 1]


def _expanded() -> list[SalmExample]:
    return [
        replace(
            e, tokens=np.zeros(len(e.tokens) + sum(len(c) // FRAME - 1 for c in e.audio), np.int32)
        )
        for e in in_conversations()
    ]


def test_a_clip_without_frames_has_no_transcript():
    asked: list[int] = []

    def transcripts(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        asked.extend(len(clip) for clip in clips)
        return [np.array([11, 12], np.int32) for _ in clips]

    engine = SimpleNamespace(
        transcripts=transcripts, frame_count=frame_count, audio_locator_tag_id=TAG
    )
    given = example([TAG, TAG, 5, TAG, 6, 7], (10, 9, 40), 3)
    (completed,) = with_transcripts(cast(Engine, engine), [given])
    assert asked == [10, 40]
    assert completed.tokens.tolist() == [TAG, 11, 12, TAG, 5, TAG, 11, 12, 6, 7]
    scored = [token in (6, 7) for token in completed.tokens.tolist()]
    assert completed.loss_mask.tolist() == scored, (
        "the mask of the given example, and no transcript"
    )


def test_as_many_texts_as_placeholders():
    with pytest.raises(ValueError, match="1 texts for 2 audio placeholders"):
        follow_placeholders(np.array([TAG, TAG]), TAG, [np.array([1])])


@pytest.mark.parametrize(
    ("longest", "planned", "multiple", "expected"),
    [(90, 96, 1, 96), (97, 96, 1, 128), (1030, 1000, 1, 1096), (1030, 1024, 48, 1120)],
)
def test_outgrown_buckets_get_few_sizes(longest, planned, multiple, expected):
    assert grown_length(longest, planned, multiple) == expected
