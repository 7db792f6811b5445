"""Invariants of the plan: every conversation once, in a shape of the plan, the same everywhere."""

import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm2_jax.data.bucketing import SURVEY_BUCKETS, Measures
from speechlm2_jax.data.bucketing import plan_buckets as plan_by
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.salm_contents import salm_shape
from speechlm2_jax.data.sampler import Sampler

settings.register_profile("plan", deadline=None, max_examples=60)
settings.load_profile("plan")


def measures_of(rows) -> Measures:
    """Conversations of (text tokens, clips, frames per clip)."""
    text, clips, frames = (np.asarray(column, np.int64) for column in zip(*rows, strict=True))
    frames = np.where(clips > 0, frames, 0)
    length = text + clips * frames
    return Measures(length=length, positions=length - 1, clips=clips, samples=frames * 1280)


# plain values: checked constructors draw random numbers, which strategies may not
corpora = st.lists(
    st.tuples(st.integers(2, 60), st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=120
)
_TOKENS = {"batch_tokens": st.integers(20, 600), "use_multimodal_sampling": st.just(True)}
configs = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(1, 9)}),
    st.fixed_dictionaries(
        {
            **_TOKENS,
            "batch_size": st.one_of(st.none(), st.integers(1, 6)),
            "quadratic_factor": st.one_of(st.none(), st.just(100.0)),
            "use_bucketing": st.booleans(),
            "num_buckets": st.integers(1, 8),
        }
    ),
    st.fixed_dictionaries({**_TOKENS, "bucket_duration_bins": st.just((30, 60, 90))}),
)


plan_buckets = functools.partial(
    plan_by, shape_of=functools.partial(salm_shape, sample_rate_hz=16000)
)


def sampler_of(measures, config, sizes=None, **more) -> Sampler:
    return Sampler(
        plan=plan_buckets(measures, config),
        measures=measures,
        sizes=sizes or (len(measures),),
        by_bucket=more.get("shuffle", False),
        **more,
    )


@given(corpora, configs)
def test_rows_are_never_below_what_the_budget_allows(rows, values):
    measures, config = measures_of(rows), DataLoaderConfig(**values)
    for bucket in plan_buckets(measures, config).buckets:
        longest = bucket.longest
        if config.quadratic_factor:
            longest += longest**2 / config.quadratic_factor
        allowed = [] if config.batch_size is None else [config.batch_size]
        if config.batch_tokens is not None:
            allowed.append(config.batch_tokens // longest)
        least = max(min(allowed), 1)
        assert bucket.shape.sequences - least in ((0, 1) if config.sums_budget else (0,))
        if bucket.shape.sequences > least:  # only where so many of the mean length fit
            up_to = measures.length[measures.length <= bucket.longest]
            assert (least + 1) * config.cost(float(up_to.mean())) <= config.batch_tokens


@given(corpora, configs)
def test_a_bucket_holds_all_that_belongs_to_it_and_to_the_shorter_ones(rows, values):
    measures, config = measures_of(rows), DataLoaderConfig(**values)
    plan = plan_buckets(measures, config, pad_to_multiple=8)
    for i, bucket in enumerate(plan.buckets):
        members = measures.take(np.flatnonzero(plan.bucket_of <= i))
        shape = bucket.shape
        assert shape.tokens % 8 == 0 and shape.tokens >= members.positions.max()
        assert shape.samples >= members.samples.max()
        assert shape.clips >= max(members.clips.max(), 1)
    longest = [bucket.longest for bucket in plan.buckets]
    assert longest == sorted(set(longest))


@given(corpora, configs, st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_every_conversation_comes_once_per_epoch_in_a_batch_that_holds_it(
    rows, values, groups, shuffle, epoch
):
    measures, config = measures_of(rows), DataLoaderConfig(**values)
    sampler = sampler_of(measures, config, groups=groups, shuffle=shuffle)
    batches = sampler.epoch(epoch)
    seen = Counter(i for batch in batches for group in batch.groups for i in group)
    assert seen == Counter(range(len(measures)))
    for batch in batches:
        shape = sampler.plan.buckets[batch.bucket].shape
        assert len(batch.groups) == groups
        for group in batch.groups:
            held = measures.take(np.asarray(group, np.int64))
            assert len(group) <= shape.sequences and held.clips.sum() <= shape.clips
            assert held.positions.max(initial=0) <= shape.tokens
            assert held.samples.max(initial=0) <= shape.samples


@given(corpora, st.integers(1, 6), st.integers(1, 3), st.integers(0, 3))
def test_batches_of_one_clip_each_are_full_but_for_the_last_of_an_epoch(
    corpus, rows, groups, epoch
):
    measures = measures_of(corpus)
    ones = Measures(
        length=measures.length,
        positions=measures.positions,
        clips=np.ones_like(measures.clips),
        samples=measures.samples,
    )
    config = DataLoaderConfig(batch_size=rows)
    sampler = sampler_of(ones, config, groups=groups, shuffle=True)
    sizes = [sum(map(len, batch.groups)) for batch in sampler.epoch(epoch)]
    assert sum(size < rows * groups for size in sizes) <= 1
    dropping = sampler_of(ones, config, groups=groups, shuffle=True, drop_last=True)
    assert all(sum(map(len, b.groups)) == rows * groups for b in dropping.epoch(epoch))


@given(corpora, configs, st.integers(0, 5))
def test_an_epoch_is_a_pure_function_of_seed_and_number(rows, values, epoch):
    measures, config = measures_of(rows), DataLoaderConfig(**values)
    first = sampler_of(measures, config, shuffle=True, seed=5)
    assert first.epoch(epoch) == sampler_of(measures, config, shuffle=True, seed=5).epoch(epoch)


def test_epochs_and_seeds_differ():
    measures = measures_of([(5, 1, n % 17) for n in range(60)])
    config = DataLoaderConfig(batch_size=4)
    sampler = sampler_of(measures, config, shuffle=True)
    other = sampler_of(measures, config, shuffle=True, seed=1)
    assert sampler.epoch(0) != sampler.epoch(1) != other.epoch(1)


def test_without_shuffling_batches_follow_the_manifest():
    measures = measures_of([(3 + n % 5, 1, n % 7) for n in range(11)])
    sampler = sampler_of(measures, DataLoaderConfig(batch_size=3), groups=2)
    assert [batch.groups for batch in sampler.epoch(0)] == [
        ((0, 1, 2), (3, 4, 5)),
        ((6, 7, 8), (9, 10)),
    ]


def test_shares_of_a_mixture_hold_and_each_source_is_gone_through_evenly():
    measures = measures_of([(5, 1, 4)] * 50)
    sampler = sampler_of(
        measures, DataLoaderConfig(batch_size=5), sizes=(10, 40), shares=(0.5, 0.5), shuffle=True
    )
    for epoch in range(4):
        batches = sampler.epoch(epoch)
        drawn = Counter(i for b in batches for group in b.groups for i in group)
        assert sum(drawn[i] for i in range(10)) == sum(drawn[i] for i in range(10, 50)) == 25
    epochs = [sampler.epoch(e) for e in range(8)]
    total = Counter(i for e in epochs for b in e for group in b.groups for i in group)
    assert {total[i] for i in range(10)} == {20} and {total[i] for i in range(10, 50)} == {5}


def test_the_survey_bounds_padding_with_few_shapes():
    random = np.random.default_rng(0)
    rows = [(10, 1, int(n)) for n in random.gamma(3, 30, 5000) + 2]
    measures = measures_of(rows)
    plan = plan_buckets(measures, DataLoaderConfig(batch_size=8))
    assert 1 < len(plan.buckets) <= SURVEY_BUCKETS
    tokens = np.asarray([b.shape.tokens for b in plan.buckets])[plan.bucket_of]
    assert measures.positions.sum() / tokens.sum() > 0.8
    one = plan_buckets(measures_of(rows[:12]), DataLoaderConfig(batch_size=8))
    assert len(one.buckets) == 1  # too little data to be worth a second program


def test_explicit_bins_leave_out_what_is_longer_where_each_has_its_own_size():
    measures = measures_of([(n, 0, 0) for n in (5, 10, 11, 20, 21)])
    config = DataLoaderConfig(
        use_multimodal_sampling=True, bucket_duration_bins=(10, 20), bucket_batch_size=(4, 2)
    )
    plan = plan_buckets(measures, config)
    assert plan.bucket_of.tolist() == [0, 0, 1, 1, -1]
    assert [bucket.shape.sequences for bucket in plan.buckets] == [4, 2]
    seen = [i for b in sampler_of(measures, config).epoch(0) for g in b.groups for i in g]
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("clips", [0, 1])
def test_a_shape_has_a_clip_even_without_audio(clips):
    plan = plan_buckets(measures_of([(5, clips, 0)] * 3), DataLoaderConfig(batch_size=2))
    shape = plan.buckets[0].shape
    assert shape.clips == max(2 * clips, 1) and shape.samples > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no batch size: set batch_size"),
        ({"batch_tokens": 100}, "use_multimodal_sampling"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"batch_size": 2, "bucket_duration_bins": (1, 2)}, "use_multimodal_sampling"),
        ({"batch_size": 2, "num_buckets": 0}, "num_buckets"),
        ({"bucket_duration_bins": ((1, 2), (3, 4))}, "2-D bins need"),
        ({"bucket_duration_bins": ((1, 2), 3), "bucket_batch_size": (1, 2)}, "pairs"),
        ({"bucket_duration_bins": ((3, 2), (1, 4)), "bucket_batch_size": (1, 2)}, "increasing"),
        ({"bucket_duration_bins": (1, 2), "max_tpt": (1.0, 2.0)}, "max_tpt: a list needs"),
        ({"bucket_duration_bins": (3, 2)}, "must be positive and increasing"),
        ({"bucket_duration_bins": (3,), "bucket_batch_size": (1, 2)}, "one entry per entry"),
    ],
)
def test_batch_settings_that_do_not_fit_together_name_the_fix(values, message):
    if "bucket_duration_bins" in values and "batch_size" not in values:
        values = {"batch_size": 1, "use_multimodal_sampling": True, **values}
    with pytest.raises(ValueError, match=message):
        DataLoaderConfig(**values)


@pytest.mark.parametrize("order", [{}, {"shuffle": True}, {"use_bucketing": True, "shuffle": True}])
def test_no_batch_but_the_last_has_fewer_rows_than_the_longest_allow(order):
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 3000).clip(20, 1023).astype(int)
    measures = measures_of([(int(n), 1, 1) for n in lengths])
    config = DataLoaderConfig(
        batch_tokens=4096, max_tokens=1024, use_multimodal_sampling=True, **order
    )
    batches = sampler_of(measures, config).epoch(0)
    rows = sorted(len(batch.groups[0]) for batch in batches)
    assert sum(rows) == len(measures) and rows[1] >= 4
