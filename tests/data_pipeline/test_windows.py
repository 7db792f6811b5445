"""Invariants of plans by windows: every row once, full batches, and resuming from small states."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm2_jax.batches import BatchShape
from speechlm2_jax.data.bucketing import Bucket, BucketPlan, Measures
from speechlm2_jax.data.index.order import Order
from speechlm2_jax.data.index.permutation import Permutation
from speechlm2_jax.data.index.planned_windows import PlannedWindows
from speechlm2_jax.data.index.windows import WindowSampler
from speechlm2_jax.data.sampler import Sampler

quick = settings(deadline=None, max_examples=15)
keys = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3)


@quick
@given(st.integers(0, 3000), keys, st.integers(0, 2**40))
def test_a_permutation_is_a_bijection_whatever_its_size_key_and_tweak(size, key, tweak):
    images = Permutation(size, key)(np.arange(size), tweak)
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 999_999])
def test_large_permutations_are_bijections(size):
    images = Permutation(size, (1, 2))(np.arange(size))
    assert (np.bincount(images, minlength=size) == 1).all()


def test_an_image_depends_on_its_position_alone():
    permutation = Permutation(10**8, (3, 4))
    positions = np.asarray([0, 99_999_999, 7, 12_345_678])
    whole = permutation(positions, 5)
    for position, image in zip(positions, whole, strict=True):
        assert permutation(np.asarray([position]), 5) == [image]
    tweaks = np.asarray([5, 6, 5, 7])
    each = [permutation(positions[n : n + 1], int(t))[0] for n, t in enumerate(tweaks)]
    np.testing.assert_array_equal(permutation(positions, tweaks), each)


def chi_squared_per_degree(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum() / (counts.size - 1))


@pytest.mark.parametrize("size", [20_000, 1_000_000])
def test_a_permutation_spreads_neighbours_evenly(size):
    permutation = Permutation(size, (11,))
    positions = np.arange(min(size, 200_000))
    images = permutation(positions)
    blocks = np.zeros((20, 20))
    np.add.at(blocks, (positions * 20 // len(positions), images * 20 // size), 1)
    steps = np.bincount((np.diff(images) % size) * 50 // size, minlength=50)
    parities = np.bincount(positions % 8 * 8 + images % 8, minlength=64)
    other = permutation(positions, 1)
    between = np.bincount((other - images) % size * 50 // size, minlength=50)
    for counts in (blocks, steps, parities, between):
        assert 0.4 < chi_squared_per_degree(counts) < 1.6
    assert np.mean(other == images) < 1e-3


def bucket(sequences, clips):
    shape = BatchShape(sequences=sequences, tokens=8, clips=clips, samples=1280)
    return Bucket(longest=1, shape=shape)


either = st.booleans()


@st.composite
def samplers(draw, *, shuffle=either, by_bucket=either, mixed=either):
    sizes = draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    total, buckets = sum(sizes), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    clips = random.integers(0, 4, total) if draw(st.booleans()) else None
    sequences = draw(st.lists(st.integers(1, 7), min_size=buckets, max_size=buckets))
    shares = draw(mixed)
    weights = np.asarray(draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))[: len(sizes)])
    return WindowSampler(
        plan=BucketPlan(
            buckets=tuple(bucket(n, max(n, 3)) for n in sequences),
            bucket_of=random.integers(0, buckets, total).astype(np.uint8),
        ),
        clips=clips,
        order=Order(
            sizes=tuple(sizes),
            shares=tuple(weights / weights.sum()) if shares else None,
            seed=draw(st.integers(0, 9)),
            shuffle=draw(shuffle),
            window_rows=draw(st.integers(1, 2 * total)),
        ),
        groups=draw(st.integers(1, 4)),
        by_bucket=draw(by_bucket),
        drop_last=False,
        endless=draw(st.booleans()),
    )


def rows_of(batches):
    return [i for batch in batches for group in batch.groups for i in group]


def epochs_of(sampler, count):
    """The batches of each epoch, without those that an epoch shares with the next."""
    return [batch for batch in PlannedWindows(sampler, epochs=count)]


@quick
@given(samplers(mixed=st.just(False)))
def test_every_row_comes_once_per_epoch_in_a_batch_that_holds_it(sampler):
    sampler = replace(sampler, endless=False)
    batches, total = epochs_of(sampler, 2), sampler.order.total
    assert Counter(rows_of(batches)) == {row: 2 for row in range(total)}
    clips = np.ones(total, int) if sampler.clips is None else sampler.clips
    for batch in batches:
        shape = sampler.plan.buckets[batch.bucket].shape
        assert len(batch.groups) == sampler.groups
        for group in batch.groups:
            assert len(group) <= shape.sequences
            assert sampler.clips is None or clips[list(group)].sum() <= shape.clips
            assert (sampler.plan.bucket_of[list(group)] <= batch.bucket).all()


@quick
@given(samplers(by_bucket=st.just(True), mixed=st.just(False)))
def test_batches_are_full_but_for_the_last_of_an_epoch(sampler):
    sampler = replace(sampler, clips=None)
    batches = epochs_of(sampler, 1)
    sizes = [sampler.plan.buckets[b.bucket].shape.sequences * sampler.groups for b in batches]
    held = [sum(map(len, batch.groups)) for batch in batches]
    assert sum(size != most for size, most in zip(held, sizes, strict=True)) <= 1
    full = sum(size == most for size, most in zip(held, sizes, strict=True))
    if full:
        assert len(epochs_of(replace(sampler, drop_last=True), 1)) == full


@quick
@given(samplers(), st.data())
def test_a_run_that_is_stopped_anywhere_resumes_with_the_same_batches(sampler, data):
    whole, states = PlannedWindows(sampler), []
    batches = []
    for batch in islice(whole, 60):
        batches.append(batch)
        states.append(json.loads(json.dumps(whole.get_state())))
    stop = data.draw(st.integers(0, len(batches) - 1))
    again = PlannedWindows(sampler)
    again.set_state(states[stop])
    assert again.get_state() == states[stop]
    assert list(islice(again, len(batches) - 1 - stop)) == batches[stop + 1 :]


@quick
@given(samplers(shuffle=st.just(True), by_bucket=st.just(True), mixed=st.just(False)))
def test_one_window_fills_batches_as_small_data_does(sampler):
    order = replace(sampler.order, window_rows=sampler.order.total)
    sampler = replace(sampler, order=order)
    total = order.total
    ones = np.ones(total, np.int64)
    clips = ones if sampler.clips is None else sampler.clips
    small = Sampler(
        plan=replace(sampler.plan, bucket_of=sampler.plan.bucket_of.astype(np.int64)),
        measures=Measures(length=ones, positions=ones, clips=clips, samples=ones),
        sizes=(total,),
        groups=sampler.groups,
        by_bucket=True,
    )
    mine = sampler.window(0, 0, sampler.nothing)
    theirs = list(small._by_bucket(order.window(0, 0)))
    key = lambda batch: (batch.bucket, batch.groups)  # noqa: E731
    assert sorted(mine, key=key) == sorted(theirs, key=key)


@quick
@given(samplers(mixed=st.just(True)))
def test_shares_hold_in_every_window_and_sources_are_gone_through_evenly(sampler):
    order = sampler.order
    starts = np.cumsum([0, *order.sizes])
    counts = np.zeros((4, len(order.sizes)), int)
    seen = Counter()
    for epoch in range(4):
        for number in range(order.windows):
            rows = order.window(epoch, number)
            source = np.searchsorted(starts, rows, side="right") - 1
            window = np.bincount(source, minlength=len(order.sizes))
            exact = np.asarray(order.shares) * len(rows)
            assert (np.abs(window - exact) <= order.windows + 1).all()
            counts[epoch] += window
            seen.update(rows.tolist())
    assert (counts == counts[0]).all() and counts[0].sum() == max(order.total, len(order.sizes))
    for s, size in enumerate(order.sizes):
        times = [seen[row] for row in range(starts[s], starts[s] + size)]
        assert max(times) - min(times) <= 1


def test_without_shuffling_windows_follow_the_rows_and_shards_come_in_nemos_order():
    order = Order(sizes=(7, 5), window_rows=4)
    rows = np.concatenate([order.window(0, number) for number in range(order.windows)])
    np.testing.assert_array_equal(rows, np.arange(12))
    shards = ((3, 4), (2, 2, 1))
    small = Sampler(
        plan=BucketPlan(buckets=(), bucket_of=np.zeros(12, np.int64)),
        measures=Measures(
            length=np.ones(12), positions=np.ones(12), clips=np.ones(12), samples=np.ones(12)
        ),
        sizes=(7, 5),
        shards=shards,
        shard_seeds=(3, 4),
    )
    sharded = replace(order, shards=shards, shard_seeds=(3, 4))
    for epoch in range(3):
        rows = np.concatenate([sharded.window(epoch, number) for number in range(3)])
        np.testing.assert_array_equal(rows, small._order(epoch))


def test_epochs_and_seeds_have_other_orders():
    order = Order(sizes=(1000,), shuffle=True, window_rows=300)
    first = np.concatenate([order.window(0, number) for number in range(order.windows)])
    assert sorted(first) == list(range(1000))
    assert (first[:300] != order.window(1, 0)).mean() > 0.9
    assert (first[:300] != replace(order, seed=1).window(0, 0)).mean() > 0.9


def test_a_state_stays_small_however_many_rows_are_left():
    random = np.random.default_rng(0)
    sampler = WindowSampler(
        plan=BucketPlan(
            buckets=tuple(bucket(32, 32) for _ in range(20)),
            bucket_of=random.integers(0, 20, 100_000).astype(np.uint8),
        ),
        order=Order(sizes=(100_000,), shuffle=True, window_rows=40_000),
        groups=16,
        by_bucket=True,
    )
    plans = PlannedWindows(sampler)
    first = len(sampler.window(0, 0, sampler.nothing))
    batches = list(islice(plans, first + 1))
    state = plans.get_state()
    carried = sum(map(len, sampler.window(0, 0, sampler.nothing).carried.rows))
    assert len(batches) == first + 1 and state["window"] == 1 and carried > 2000
    assert sum(len(json.dumps(part)) for part in state["left"][:-1]) < 100
