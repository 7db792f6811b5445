"""Packed rows and budgets of a large data set are those of one in memory."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.bucketing import Measures
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.index import row_count
from speechlm2_jax.data.index.order import Order
from speechlm2_jax.data.index.packed_windows import PackedWindowSampler
from speechlm2_jax.data.index.planned_windows import PlannedWindows
from speechlm2_jax.data.loader import PlannedBatches
from speechlm2_jax.data.packing import PackedSampler, plan_packed
from tests.data_pipeline.small_corpus import TAG, frames, read_rows, write_manifest

quick = settings(deadline=None, max_examples=15)
either = st.booleans()


@st.composite
def samplers(draw, *, by_bucket=either, endless=either):
    """A sampler of windows, and one of the same data in memory."""
    total, random = draw(st.integers(1, 150)), np.random.default_rng(draw(st.integers(0, 99)))
    positions, clips = random.integers(2, 120, total), random.integers(0, 3, total)
    measures = Measures(
        length=positions + 1, positions=positions, clips=clips, samples=clips * positions * 1280
    )
    config = DataLoaderConfig(
        packed=True,
        batch_size=draw(st.integers(1, 3)),
        max_tokens=draw(st.sampled_from([None, 300])),
        use_bucketing=draw(st.booleans()),
        num_buckets=draw(st.integers(1, 3)),
    )
    common = {
        "plan": plan_packed(measures, config, 8),
        "groups": draw(st.integers(1, 3)),
        "by_bucket": draw(by_bucket),
        "endless": draw(endless),
    }
    windows = PackedWindowSampler(
        **common,
        positions=positions.astype(np.uint8),
        clips=clips.astype(np.uint16),
        order=Order(
            sizes=(total,), window_rows=draw(st.integers(1, 2 * total)), shuffle=draw(either)
        ),
    )
    return windows, PackedSampler(**common, measures=measures, sizes=(total,))


@quick
@given(samplers(by_bucket=st.just(False)))
def test_batches_in_order_are_those_of_data_in_memory_whatever_the_windows(both):
    windows, small = both
    windows = replace(windows, order=replace(windows.order, shuffle=False))
    epochs = 3
    mine = list(PlannedWindows(windows, epochs))
    assert mine == list(PlannedBatches(small, epochs)) and mine[0].rows is not None


@quick
@given(samplers(by_bucket=st.just(True)))
def test_one_window_fills_buckets_as_data_in_memory_does(both):
    windows, small = both
    windows = replace(windows, order=replace(windows.order, window_rows=windows.order.total))
    mine = windows.window(0, 0, windows.nothing)
    theirs = list(small._by_bucket(windows.order.window(0, 0)))
    key = lambda batch: (batch.bucket, batch.groups)  # noqa: E731
    assert sorted(mine, key=key) == sorted(theirs, key=key)


@quick
@given(samplers(endless=st.just(False)))
def test_every_conversation_comes_once_per_epoch_and_rows_and_clips_hold_all(both):
    windows, small = both
    batches, measures = list(PlannedWindows(windows, 2)), small.measures
    seen = Counter(i for batch in batches for group in batch.groups for i in group)
    assert seen == {i: 2 for i in range(windows.order.total)}
    for batch in batches:
        shape = windows.plan.buckets[batch.bucket].shape
        assert len(batch.groups) == len(batch.rows) == windows.groups
        for group, rows in zip(batch.groups, batch.rows, strict=True):
            taken = np.zeros(shape.sequences, np.int64)
            np.add.at(taken, list(rows), measures.positions[list(group)])
            assert len(group) == len(rows) and taken.max() <= shape.tokens
            assert measures.clips[list(group)].sum() <= shape.clips
            assert measures.samples[list(group)].max(initial=0) <= shape.samples


@quick
@given(samplers(), st.data())
def test_a_run_that_is_stopped_anywhere_resumes_with_the_same_batches(both, data):
    windows, _ = both
    whole, states, batches = PlannedWindows(windows), [], []
    for batch in islice(whole, 60):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.get_state())))
    stop = data.draw(st.integers(0, len(batches) - 1))
    again = PlannedWindows(windows)
    again.set_state(states[stop])
    assert again.get_state() == states[stop]
    assert list(islice(again, len(batches) - 1 - stop)) == batches[stop + 1 :]


def test_a_state_marks_what_is_left_with_a_bit_for_each_row():
    positions = np.random.default_rng(0).integers(40, 200, 20_000)
    measures = Measures(
        length=positions, positions=positions, clips=positions * 0 + 1, samples=positions * 1280
    )
    config = DataLoaderConfig(packed=True, packed_tokens=2048, batch_size=16)
    windows = PackedWindowSampler(
        plan=plan_packed(measures, config, 8),
        positions=positions,
        clips=measures.clips,
        order=Order(sizes=(20_000,), window_rows=9000, shuffle=True),
        groups=8,
    )
    plans = PlannedWindows(windows)
    first = windows.window(0, 0, windows.nothing)
    list(islice(plans, len(first) + 1))
    left = plans.get_state()["left"]
    assert len(first.carried.rows[0]) > 200 and len(json.dumps(left)) < 300
    assert windows.with_fill().plan.filled[0] > 0.98


@pytest.fixture
def manifest(corpus, tmp_path):
    rows = read_rows(corpus / "manifest.jsonl")
    for n, row in enumerate(rows):
        row |= {"audio_filepath": str(corpus / row["audio_filepath"]), "id": f"row{n}"}
        row["text"] = "words " * (n * 7 % 11 + 1)
    return write_manifest(tmp_path / "m.jsonl", rows)


def module_of(tokenizer, manifest, **settings):
    entry = {"manifest_filepath": str(manifest), "audio_locator_tag": TAG}
    train = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "input_cfg": [entry]}
    module = DataModule({"train_ds": train | settings}, tokenizer, SALMDataset(tokenizer))
    module.setup(frame_count=frames, groups=2)
    return module


PACKED = {"packed": True, "batch_size": 2}
BUDGET = {"use_multimodal_sampling": True, "batch_tokens": 150}


@pytest.mark.parametrize(
    "keys",
    [
        {**PACKED, "packed_tokens": 64},
        {**PACKED, "packed_tokens": 45},
        {**PACKED, "max_tokens": 200},
        BUDGET,
        {**BUDGET, "quadratic_factor": 60, "max_tokens": 60},
    ],
)
def test_an_index_gives_the_plan_of_data_in_memory(keys, manifest, tokenizer, monkeypatch):
    small = module_of(tokenizer, manifest, **keys)
    monkeypatch.setattr(row_count, "LARGE_ROWS", 1)
    monkeypatch.setattr("speechlm2_jax.data.prepare.IN_ORDER_ROWS", 7)
    large = module_of(tokenizer, manifest, **keys)
    assert large.plan().buckets == small.plan().buckets
    assert large.dropped == small.dropped
    assert [one.ids for one in islice(large.train_batches(), 20)] == [
        one.ids for one in islice(small.train_batches(), 20)
    ]
    rows = {batch.rows is None for batch in large.plans()}
    assert rows == {"packed" not in keys}
    if keys.get("packed_tokens") == 45:
        assert large.dropped["longer_than_buckets"]
    if "packed" not in keys:
        assert large.prepared().sampler.budget == 150
        assert len({len(group) for batch in large.plans() for group in batch.groups}) > 1


def test_packed_buckets_of_an_index_are_those_of_data_in_memory(manifest, tokenizer, monkeypatch):
    keys = {**PACKED, "packed_tokens": 128, "use_bucketing": True, "num_buckets": 3}
    small = module_of(tokenizer, manifest, **keys)
    monkeypatch.setattr(row_count, "LARGE_ROWS", 1)
    large = module_of(tokenizer, manifest, **keys, shuffle=True)
    assert large.plan().members == small.plan().members
    assert large.plan().buckets == small.plan().buckets and len(small.plan().buckets) > 1
    count = large.batches_per_pass()
    ids = [i for batch in islice(large.train_batches(), count) for i in batch.ids]
    assert sorted(ids) == sorted(f"row{n}" for n in range(30))
