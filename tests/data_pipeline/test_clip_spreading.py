"""Groups have all their rows, however unevenly recordings are spread over conversations."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm2_jax.data.bucketing import Measures, plan_buckets
from speechlm2_jax.data.clip_room import with_room
from speechlm2_jax.data.clip_spreading import spread
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.index.order import Order
from speechlm2_jax.data.index.planned_windows import PlannedWindows
from speechlm2_jax.data.index.windows import WindowSampler
from speechlm2_jax.data.salm_contents import salm_shape
from speechlm2_jax.data.sampler import Sampler

quick = settings(deadline=None, max_examples=15)
MANY = 30


@quick
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99), st.floats(0.01, 0.9))
def test_clips_can_be_spread_wherever_there_is_room_for_the_mean_and_one_more(
    rows, groups, seed, share
):
    random = np.random.default_rng(seed)
    clips = np.where(random.random(rows * groups) < share, MANY, random.integers(0, 4))
    if seed % 2:
        clips = np.sort(clips)
    ends = np.arange(rows, len(clips) + 1, rows)
    most = int(np.ceil(rows * clips.mean() + clips.max()))
    order = spread(clips, ends, most)
    assert sorted(order.tolist()) == list(range(len(clips)))
    assert clips[order].reshape(groups, rows).sum(axis=1).max() <= most


def test_groups_with_room_stay_as_they_are():
    clips = np.asarray([1, 9, 2, 1, 8, 9, 1, 1, 9, 1, 2, 2])
    order = spread(clips, np.asarray([3, 6, 9, 12]), 12)
    np.testing.assert_array_equal(order, [0, 1, 2, 3, 9, 5, 6, 7, 8, 4, 10, 11])


def test_exchanges_keep_the_budget_where_they_can():
    clips, ends = np.asarray([1, 9, 9, 1, 1, 1, 1, 1, 1]), np.asarray([3, 6, 9])
    nearest = spread(clips, ends, 12)
    np.testing.assert_array_equal(nearest, [0, 3, 2, 1, 4, 5, 6, 7, 8])
    costs = np.asarray([1, 1, 1, 12, 12, 12, 1, 1, 1])
    within = spread(clips, ends, 12, costs, 11)
    np.testing.assert_array_equal(within, [0, 6, 2, 3, 4, 5, 1, 7, 8])


def skewed(count, share, seed):
    """Conversations of at most 1024 tokens, of which a share has many recordings."""
    random = np.random.default_rng(seed)
    clips = np.where(random.random(count) < share, MANY, 1)
    frames = np.where(clips > 1, random.integers(1, 20, count), random.integers(5, 600, count))
    length = random.lognormal(4, 0.8, count).clip(20, 400).astype(int) + clips * frames
    return Measures(length=length, positions=length - 1, clips=clips, samples=frames * 1280)


orders = st.sampled_from([{}, {"shuffle": True}, {"use_bucketing": True, "num_buckets": 5}])
corpora = st.tuples(st.integers(40, 700), st.floats(0.0, 0.5), st.integers(0, 999))


def planned(corpus, order, *, is_sorted):
    """Measures and a plan, as `prepare` makes them."""
    measures = skewed(*corpus)
    if is_sorted:
        measures = measures.take(np.argsort(measures.clips, kind="stable"))
    config = DataLoaderConfig(
        batch_tokens=4096, max_tokens=1024, use_multimodal_sampling=True, **order
    )
    return measures, config, plan_buckets(measures, config, lambda m: salm_shape(m, 16000))


def check(batches, measures, plan, groups):
    """Batches that are full but for one, in shapes that hold them."""
    short = 0
    for batch in batches:
        shape = plan.buckets[batch.bucket].shape
        assert len(batch.groups) == groups
        for group in batch.groups:
            held = measures.take(np.asarray(group, np.int64))
            assert len(group) <= shape.sequences and held.clips.sum() <= shape.clips
            assert held.positions.max(initial=0) <= shape.tokens
        short += min(map(len, batch.groups)) < 4
    assert short <= 1


@quick
@given(corpora, orders, st.integers(1, 3), st.booleans(), st.booleans())
def test_no_batch_of_a_list_but_the_last_has_fewer_rows_than_the_longest_allow(
    corpus, order, groups, is_sorted, has_shares
):
    measures, config, plan = planned(corpus, order, is_sorted=is_sorted)
    half = len(measures) // 2
    sampler = with_room(
        Sampler(
            plan=plan,
            measures=measures,
            sizes=(half, len(measures) - half),
            shares=(0.5, 0.5) if has_shares else None,
            groups=groups,
            seed=corpus[2],
            shuffle=config.shuffle,
            by_bucket=bool(order),
            budget=config.budget if config.sums_budget else None,
            costs=measures.length if config.sums_budget else None,
        )
    )
    for epoch in range(3):
        batches = sampler.epoch(epoch)
        check(batches, measures, sampler.plan, groups)
        rows = sorted(i for batch in batches for group in batch.groups for i in group)
        assert has_shares or rows == list(range(len(measures)))


# windows are large: those of a few batches may lack what could be exchanged
@settings(quick, derandomize=True)
@given(
    st.tuples(st.integers(400, 900), st.floats(0.0, 0.1), st.integers(0, 999)),
    *(orders, st.integers(1, 2), st.booleans(), st.integers(300, 900)),
)
def test_no_batch_of_an_index_but_the_last_has_fewer_rows_than_the_longest_allow(
    corpus, order, groups, is_sorted, window_rows
):
    measures, config, plan = planned(corpus, order, is_sorted=is_sorted)
    sums = config.sums_budget
    sampler = with_room(
        WindowSampler(
            plan=plan,
            clips=measures.clips.astype(np.uint16),
            lengths=measures.length if sums else None,
            budget=config.budget if sums else None,
            cost=config.cost,
            order=Order(
                sizes=(len(measures),),
                seed=corpus[2],
                shuffle=config.shuffle,
                window_rows=window_rows,
            ),
            groups=groups,
            by_bucket=bool(order),
        )
    )
    first, batches = (list(PlannedWindows(sampler, epochs)) for epochs in (1, 2))
    for part in (first, batches[len(first) :]):
        check(part, measures, sampler.plan, groups)
        rows = sorted(i for batch in part for group in batch.groups for i in group)
        assert rows == list(range(len(measures)))


def test_shapes_get_more_clips_only_where_batches_need_them():
    measures, _, plan = planned((300, 0.03, 0), {"shuffle": True}, is_sorted=False)
    sampler = Sampler(plan=plan, measures=measures, sizes=(300,), shuffle=True, by_bucket=True)
    assert with_room(sampler).plan == plan
    assert all(b.shape.clips < b.shape.sequences * MANY / 2 for b in plan.buckets)
    few = tuple(replace(b, shape=replace(b.shape, clips=MANY)) for b in plan.buckets)
    roomy = with_room(replace(sampler, plan=replace(plan, buckets=few)))
    assert roomy.plan != replace(plan, buckets=few)
    check(roomy.epoch(5), measures, roomy.plan, 1)


@pytest.mark.parametrize("by_bucket", [True, False])
def test_a_state_resumes_where_windows_exchange_conversations(by_bucket):
    measures, config, plan = planned((600, 0.2, 1), {"shuffle": True}, is_sorted=False)
    sampler = WindowSampler(
        plan=plan,
        clips=measures.clips,
        order=Order(sizes=(600,), seed=3, shuffle=config.shuffle, window_rows=70),
        groups=2,
        by_bucket=by_bucket,
    )
    whole = PlannedWindows(sampler, 2)
    states, batches = [whole.get_state()], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.get_state())
    for stop in range(0, len(batches), 17):
        again = PlannedWindows(sampler, 2)
        again.set_state(states[stop])
        assert list(again) == batches[stop:]
