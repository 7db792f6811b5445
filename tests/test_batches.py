"""Rows and groups: every audio frame once, in order, and NeMo's own unit cases."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechlm2_jax.batches import BatchShape, SalmExample, assemble_salm_batch, layout_sequence
from speechlm2_jax.networks.interleave import interleave

PLACEHOLDERS = json.loads(
    (Path(__file__).parent / "data" / "salm" / "placeholders.json").read_text()
)
IGNORED_TARGET = -100
MOST_ROWS, MOST_CLIPS = 4, 3


@pytest.mark.parametrize("name", [n for n in PLACEHOLDERS if not n.startswith("too_")])
def test_rows_equal_nemo_placeholder_cases(name):
    case = PLACEHOLDERS[name]
    targets = case["target_ids"]
    clips = iter(case["replacements"])
    for row, expected in enumerate(case["out_embeds"]):
        ids, embeds = np.array(case["input_ids"][row]), np.array(case["embeds"][row], np.float32)
        real = np.flatnonzero(ids != case["padding_id"])  # NeMo drops the padding on the left
        first = real[0] if len(real) else len(ids)
        ids, embeds = ids[first:], embeds[first:]
        frames = [np.array(next(clips), np.float32) for i in ids if i == case["placeholder_id"]]
        mask = np.zeros(len(ids), bool)
        if targets is not None:
            mask = np.array(targets[row])[first:] != IGNORED_TARGET
        laid = layout_sequence(
            ids, mask, [len(f) for f in frames], placeholder_id=case["placeholder_id"]
        )
        start = len(expected) - len(laid)
        text = iter(embeds[ids != case["placeholder_id"]])
        got = [
            frames[c][f] if c >= 0 else next(text)
            for c, f in zip(laid.clip, laid.frame, strict=True)
        ]
        if got:
            np.testing.assert_array_equal(np.stack(got), np.array(expected, np.float32)[start:])
        batch = _one_row(ids, mask, frames, case).without_id(case["padding_id"])
        np.testing.assert_array_equal(
            batch.attention_mask[0, 0], np.array(case["out_attention_mask"][row], bool)[start:]
        )
        if targets is not None:
            want = np.array(case["out_target_ids"][row])[start:]
            shifted = _one_row(ids, mask, frames, case, shift=True).without_id(case["padding_id"])
            is_scored = shifted.loss_mask[0, 0]
            np.testing.assert_array_equal(is_scored, want[1:] != IGNORED_TARGET)
            np.testing.assert_array_equal(shifted.targets[0, 0][is_scored], want[1:][is_scored])


def _one_row(ids, mask, frames, case, *, shift=False):
    """A batch of exactly one conversation, whose clips have as many samples as frames."""
    audio = tuple(np.zeros(len(f), np.float32) for f in frames)
    steps = len(ids) - len(audio) + sum(map(len, audio))
    longest = max(map(len, audio), default=0)
    return assemble_salm_batch(
        [[SalmExample(id="x", tokens=ids, loss_mask=mask, audio=audio)]],
        BatchShape(sequences=1, tokens=max(steps - shift, 0), clips=len(audio), samples=longest),
        frame_count=lambda samples: samples,
        placeholder_id=case["placeholder_id"],
        shift=shift,
    )


@pytest.mark.parametrize("clips", [[], [3, 2]])
def test_a_wrong_number_of_clips_is_refused(clips):
    with pytest.raises(ValueError, match="exactly one clip per placeholder"):
        layout_sequence(np.array([4, 9, 5]), None, clips, placeholder_id=9)


@given(
    st.lists(st.lists(st.integers(1, 6), max_size=MOST_CLIPS), min_size=1, max_size=MOST_ROWS),
    st.randoms(),
)
def test_interleaving_keeps_every_frame_once_and_in_order(rows, random):
    capacity, width = 6, 2
    examples, expected = [], []
    for clips in rows:
        ids: list[int] = []
        for _ in clips:
            ids += [random.randint(1, 8) for _ in range(random.randint(0, 2))] + [9]
        ids += [random.randint(1, 8)]
        examples.append(
            SalmExample(
                id="x",
                tokens=np.array(ids, np.int32),
                loss_mask=np.zeros(len(ids), bool),
                audio=tuple(np.zeros(n, np.float32) for n in clips),
            )
        )
    n_clips = MOST_ROWS * MOST_CLIPS  # one shape for all examples: one compilation
    batch = assemble_salm_batch(
        [examples],
        BatchShape(sequences=MOST_ROWS, tokens=28, clips=n_clips, samples=capacity),
        frame_count=lambda samples: samples,
        placeholder_id=9,
        shift=False,
    )
    frames = jnp.arange(n_clips * capacity, dtype=jnp.float32).reshape(1, n_clips, capacity, 1)
    frames = jnp.tile(frames, width)
    text = jnp.full((*batch.tokens.shape, width), -1.0)
    out = np.asarray(interleave(text, frames, jnp.asarray(batch.audio_index)))[0]
    clip = 0
    for r, clips in enumerate(rows):
        got = out[r, :, 0][out[r, :, 0] >= 0]
        for n in clips:
            expected = np.arange(clip * capacity, clip * capacity + n)
            np.testing.assert_array_equal(got[:n], expected)
            got = got[n:]
            clip += 1
        assert not len(got)
    assert (batch.positions >= 0).all() and batch.segments.max() == 1


def test_a_conversation_that_does_not_fit_is_refused():
    example = SalmExample(id="long", tokens=np.arange(1, 9), loss_mask=np.ones(8, bool))
    with pytest.raises(ValueError, match="'long'"):
        assemble_salm_batch(
            [[example]],
            BatchShape(sequences=1, tokens=6, clips=1, samples=1),
            frame_count=lambda s: s,
            placeholder_id=99,
        )
