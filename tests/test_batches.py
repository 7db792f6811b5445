"""Rows and groups: every audio frame once, in order, and NeMo's own unit cases."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechlm2_jax.batches import BatchShape, SalmExample, assemble_salm_batch, layout_row
from speechlm2_jax.networks.interleave import interleave

PLACEHOLDERS = json.loads(
    (Path(__file__).parent / "data" / "salm" / "placeholders.json").read_text()
)
IGNORED_TARGET = -100
MOST_ROWS, MOST_CLIPS = 4, 3


@pytest.mark.parametrize("name", [n for n in PLACEHOLDERS if not n.startswith("too_")])
def test_rows_equal_nemo_placeholder_cases(name):
    case = PLACEHOLDERS[name]
    ids = np.array(case["input_ids"])
    embeds = np.array(case["embeds"], np.float32)
    frames = [np.array(r, np.float32) for r in case["replacements"]]
    targets = case["target_ids"]
    next_clip = 0
    for row, expected in enumerate(case["out_embeds"]):
        n_clips = int((ids[row] == case["placeholder_id"]).sum())
        mine = frames[next_clip : next_clip + n_clips]
        next_clip += n_clips
        mask = None if targets is None else np.array(targets[row]) != IGNORED_TARGET
        laid = layout_row(
            ids[row],
            mask,
            [len(f) for f in mine],
            placeholder_id=case["placeholder_id"],
            pad_id=case["padding_id"],
        )
        start = len(expected) - len(laid)
        # one embedding row per id: look the row's own embeddings up by a running text index
        text_rows = [e for i, e in zip(ids[row], embeds[row], strict=True)]
        real = np.flatnonzero(ids[row] != case["padding_id"])
        text_rows = text_rows[real[0] :] if len(real) else []
        expanded = []
        clip = 0
        for i, e in zip(ids[row][len(ids[row]) - len(text_rows) :], text_rows, strict=True):
            if i == case["placeholder_id"]:
                expanded += [mine[clip][f] for f in range(len(mine[clip]))]
                clip += 1
            else:
                expanded.append(e)
        got = [
            mine[c][f] if c >= 0 else expanded[t]
            for t, (c, f) in enumerate(zip(laid.clip, laid.frame, strict=True))
        ]
        if len(laid):
            np.testing.assert_array_equal(np.stack(got), np.array(expected, np.float32)[start:])
        np.testing.assert_array_equal(
            laid.is_key, np.array(case["out_attention_mask"][row], bool)[start:]
        )
        if targets is not None:
            want = np.array(case["out_target_ids"][row])[start:]
            np.testing.assert_array_equal(laid.loss_mask, want != IGNORED_TARGET)
            np.testing.assert_array_equal(laid.tokens[laid.loss_mask], want[laid.loss_mask])


@pytest.mark.parametrize("clips", [[], [3, 2]])
def test_a_wrong_number_of_clips_is_refused(clips):
    with pytest.raises(ValueError, match="exactly one clip per placeholder"):
        layout_row(np.array([4, 9, 5]), None, clips, placeholder_id=9, pad_id=0)


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
        BatchShape(rows=MOST_ROWS, tokens=28, clips=n_clips, samples=capacity),
        frame_count=lambda samples: samples,
        placeholder_id=9,
        pad_id=0,
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
            BatchShape(rows=1, tokens=6, clips=1, samples=1),
            frame_count=lambda s: s,
            placeholder_id=99,
            pad_id=0,
        )
