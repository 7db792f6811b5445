"""Duplex batches: an example is the same in any batch."""

import dataclasses

import numpy as np
import pytest

from speechlm2_jax.batches import (
    DuplexExample,
    DuplexShape,
    assemble_duplex_batch,
    full_duplex_batch,
)

PAD = 7
SHAPE = DuplexShape(sequences=2, tokens=8, source_samples=80, target_samples=120)


def example(name: str, frames: int) -> DuplexExample:
    random = np.random.default_rng(frames)
    return DuplexExample(
        id=name,
        source_audio=random.normal(size=10 * frames).astype(np.float32),
        target_audio=random.normal(size=15 * frames).astype(np.float32),
        target_tokens=random.integers(8, 90, frames).astype(np.int32),
        source_tokens=random.integers(8, 90, frames).astype(np.int32),
    )


def test_rows_hold_their_examples_and_padding_elsewhere():
    one, two = example("one", 3), example("two", 8)
    batch = assemble_duplex_batch([[one], [None, two]], SHAPE, pad_id=PAD)
    for field in ("source_audio", "target_audio", "target_tokens", "source_tokens"):
        array, padding = getattr(batch, field), PAD if "tokens" in field else 0
        for place, held in {(0, 0): one, (1, 1): two, (0, 1): None, (1, 0): None}.items():
            values = np.zeros(0) if held is None else getattr(held, field)
            np.testing.assert_array_equal(array[place][: len(values)], values)
            assert (array[place][len(values) :] == padding).all()
    assert batch.source_lengths.tolist() == [[30, 0], [0, 80]]
    assert batch.target_lengths.tolist() == [[45, 0], [0, 120]]
    assert batch.token_lengths.tolist() == [[3, 0], [0, 8]]
    assert batch.source_extent.tolist() == [30, 80]
    assert batch.target_extent.tolist() == [45, 120]
    assert batch.token_extent.tolist() == [3, 8]
    assert batch.sequence_ids.tolist() == [[0, 1], [2, 3]]


def test_a_batch_of_no_rows_has_the_shape_of_a_full_one():
    empty = assemble_duplex_batch([[], [], []], SHAPE, pad_id=PAD)
    full = full_duplex_batch(SHAPE, 3, pad_id=PAD)
    for field in dataclasses.fields(empty):
        one, other = getattr(empty, field.name), getattr(full, field.name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), field.name
    assert not empty.source_lengths.any() and not empty.token_extent.any()
    assert (full.token_lengths == 8).all() and (full.target_extent == 120).all()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[example("long", 9)]], "'long': source_audio of 90 exceeds"),
        ([[example("a", 1)] * 3], "3 conversations exceed"),
    ],
)
def test_what_does_not_fit_is_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        assemble_duplex_batch(groups, SHAPE, pad_id=PAD)


def test_the_name_holds_the_whole_shape():
    assert SHAPE.name == "rows2_tokens8_source80_target120"
