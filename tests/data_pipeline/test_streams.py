"""Streams of tars: who reads what, in which order, and where a stopped run resumes."""

import json
import threading
from collections import Counter
from functools import partial

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from speechlm2_jax.data.streams import feed
from speechlm2_jax.data.streams.events import PoolReader, StreamPlace
from speechlm2_jax.data.streams.group import MOST_OVERFULL, GroupStream
from speechlm2_jax.data.streams.order import ShardOrder
from speechlm2_jax.data.streams.schedule import Schedule, step_shares
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import (
    read_rows,
    wav_bytes,
    write_lines,
    write_tar,
)
from tests.data_pipeline.small_streams import (
    assert_equal,
    closing,
    global_batches,
    merged,
    stream_module,
    streams_of,
    write_shards,
)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight shards of six members."""
    return write_shards(tmp_path_factory.mktemp("eight"), 8, 6)


@pytest.fixture
def module_of(tokenizer):
    """Makes a module over a stream."""
    return partial(stream_module, tokenizer)


@pytest.mark.parametrize(("groups", "shards"), [(4, 8), (3, 8), (4, 4)])
def test_each_example_comes_once_in_each_epoch(module_of, tmp_path, groups, shards):
    one = write_shards(tmp_path, shards, 3)
    (stream,) = streams_of(module_of, 1, one, groups=groups)
    closing([stream])
    counts = Counter()
    for group in range(groups):
        own = GroupStream(stream._reader.sampler, group, stream._reader.ready)
        for _ in range(-(-shards * 3 * 3 // groups)):
            ready = own._pools[0].take()
            counts[ready.event.epoch, ready.what.id] += 1
        own.close()
    names = {f"s{s:02d}m{n:02d}.wav" for s in range(shards) for n in range(3)}
    for epoch in range(2):
        assert {name for e, name in counts if e == epoch} == names
    assert set(counts.values()) == {1}


def test_fewer_shards_than_groups_share_their_members(module_of, tmp_path, caplog):
    one = write_shards(tmp_path, 2, 6)
    (stream,) = streams_of(module_of, 1, one, groups=4)
    closing([stream])
    assert "has 2 shards for 4 data-parallel groups" in caplog.text
    order = ShardOrder(shards=2, groups=4, seed=0, shuffle=False)
    assert [order.unit(n)[1:] for n in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.slow  # three runs
def test_batches_are_the_same_on_any_number_of_hosts(module_of, eight):
    expected = None
    for hosts in (1, 2, 4):
        streams = streams_of(module_of, hosts, eight)
        found = global_batches(streams, 12)
        closing(streams)
        expected = expected or found
        assert_equal(found, expected)
    assert len({bucket for bucket, _, _ in expected}) > 1


@pytest.mark.parametrize("shuffle", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_with_the_same_batches_on_other_hosts(module_of, eight, shuffle):
    streams = streams_of(module_of, 2, eight, shuffle=shuffle)
    global_batches(streams, 13)
    state = merged(streams)
    expected = global_batches(streams, 50)
    closing(streams)
    assert all(len(json.dumps(one)) < 400 for one in state["streams"].values())
    for hosts in (4,) if shuffle else (1, 4):
        streams = streams_of(module_of, hosts, eight, state=state, shuffle=shuffle)
        assert_equal(global_batches(streams, 50), expected)
        closing(streams)


def test_no_group_is_read_by_two_hosts(module_of, eight, monkeypatch):
    opened = []
    blocks_of = feed.blocks_of

    def recorded(path, start, storage):
        opened[-1].append(path.rpartition("_")[2])
        return blocks_of(path, start, storage)

    monkeypatch.setattr(feed, "blocks_of", recorded)
    expected = []
    order = ShardOrder(shards=8, groups=4, seed=3, shuffle=True)
    for host in range(4):
        opened.append([])
        before = set(threading.enumerate())
        stream = module_of(eight, own=[host]).train_batches()
        for _ in range(10):
            next(stream)
        stream.close()
        for thread in set(threading.enumerate()) - before:  # one may be about to open a file
            if thread.name == "read_shards":
                thread.join(60)
                assert not thread.is_alive()
        expected.append([f"{order.unit(host + 4 * n).shard}.tar" for n in range(len(opened[-1]))])
    assert opened == expected and min(map(len, opened)) >= 2


def test_the_buffer_is_bounded(module_of, eight):
    (stream,) = streams_of(module_of, 1, eight, shuffle_buffer_size=9)
    groups = stream._run._groups.values()
    for _ in range(30):
        next(stream)
        assert all(group.waiting <= MOST_OVERFULL * 9 for group in groups)
    stream.close()


def test_shuffled_examples_are_spread_and_others_follow_the_tars(module_of, eight):
    (stream,) = streams_of(module_of, 1, eight, groups=1, shuffle=False, batch_size=6)
    first = [i for _, ids, _ in global_batches([stream], 8) for i in ids]
    stream.close()
    per_shape = Counter(i[:3] for i in first)
    assert [*per_shape] == sorted(per_shape)
    (stream,) = streams_of(module_of, 1, eight, groups=1, batch_size=6)
    other = [i for _, ids, _ in global_batches([stream], 8) for i in ids]
    stream.close()
    assert sorted(set(first)) != first or first != other


@pytest.mark.slow  # 30 batches of 16
def test_weighted_streams_give_their_shares(module_of, eight, tmp_path):
    (tmp_path / "b").mkdir()
    small = write_shards(tmp_path / "b", 4, 3, {"context": "b"})
    entries = [{**eight, "weight": 3}, {**small, "weight": 1}]
    streams = streams_of(module_of, 2, *entries, groups=2, batch_size=8)
    ids = [i for _, ids, _ in global_batches(streams, 20) for i in ids]
    state = merged(streams)
    expected = global_batches(streams, 10)
    closing(streams)
    counts = streams[0]._faults.dropped.read + streams[1]._faults.dropped.read
    share = counts[eight["manifest_filepath"]] / counts.total()
    assert len(ids) > 200 and abs(share - 0.75) < 0.08
    streams = streams_of(module_of, 1, *entries, groups=2, batch_size=8, state=state)
    assert_equal(global_batches(streams, 10), expected)
    closing(streams)


# --- faults ---


def test_faults_are_counted_exactly_and_batches_stay_full(module_of, tmp_path):
    one = write_shards(tmp_path, 4, 6)
    listed = read_rows(tmp_path / "manifest_1.jsonl")
    good = [(row["audio_filepath"], wav_bytes(row["duration"])) for row in listed]
    good[2] = (good[2][0], b"no audio" * 99)
    write_tar(tmp_path / "audio_1.tar", [*good, ("more.wav", wav_bytes(0.2))])
    path = tmp_path / "audio_2.tar"
    path.write_bytes(path.read_bytes()[:-30_000])
    from speechlm2_jax.data.tars import tar_members

    with pytest.raises(SettingsError):
        tar_members(path)
    (tmp_path / "audio_3.tar").unlink()
    module = module_of(one, groups=1, num_workers=2, shuffle_buffer_size=400)
    module.keep_errors(tmp_path / "errors.jsonl")
    stream = module.train_batches()
    epochs = Counter()
    while min((epochs[n] for n in ("s00m00.wav", "s01m00.wav")), default=0) < 3:
        batch = next(stream)
        assert len(batch.ids) == 2
        epochs.update(batch.ids)
    stream.close()
    rows = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    by_id = {row["id"]: row["cause"] for row in rows}
    causes = Counter(by_id.values())
    lost = [i for i, cause in by_id.items() if cause == "truncated"]
    assert causes["missing"] == 6 and causes["unreadable"] == 1 and causes["no_row"] == 1
    assert lost and lost == [f"s02m{n:02d}.wav" for n in range(6 - len(lost), 6)]
    assert by_id["more.wav"] == "no_row"
    broken = [row for row in rows if row["cause"] == "unreadable"]
    assert all(row["replaced_by"] for row in broken)
    assert stream._faults.dropped.counts == Counter(row["cause"] for row in rows)
    state = stream.get_state()
    again = module_of(one, groups=1, shuffle_buffer_size=400).train_batches(state)
    assert again._faults.dropped.counts == state["dropped"]
    again.close()


def test_a_stream_without_a_usable_example_stops(module_of, tmp_path):
    one = write_shards(tmp_path, 2, 2)
    for shard in range(2):
        write_tar(tmp_path / f"audio_{shard}.tar", [("other.wav", wav_bytes(0.2))])
    stream = module_of(one, groups=1).train_batches()
    with pytest.raises(SettingsError, match="no shard of the stream has an example"):
        next(stream)
    stream.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packed": True, "batch_tokens": 99, "use_multimodal_sampling": True}, "packed needs all"),
        ({"concatenate_samples": True}, "concatenate_samples needs all"),
    ],
)
def test_what_needs_all_examples_is_refused(module_of, eight, settings, message):
    with pytest.raises(SettingsError, match=message):
        module_of(eight, **settings)


def test_a_manifest_of_files_is_no_stream(module_of, tmp_path):
    write_lines(tmp_path / "m.jsonl", {"audio_filepath": "a.wav", "duration": 1.0, "text": "x"})
    with pytest.raises(SettingsError, match=r"train_ds\.stream: .*m\.jsonl is not in tars"):
        module_of({"manifest_filepath": str(tmp_path / "m.jsonl")})


@pytest.fixture
def faulty(tmp_path):
    """Three shards: segments and rows without members, a lone member, the end of a tar cut off."""
    folder = tmp_path
    one = write_shards(folder, 3, 5)
    rows = read_rows(folder / "manifest_0.jsonl")
    name = rows[1]["audio_filepath"]
    segments = [
        {**rows[1], "audio_filepath": name.replace(".wav", f"-sub{n}.wav"), "duration": 0.1}
        for n in (2, 1)
    ]
    gone = [{**rows[0], "audio_filepath": f"gone{n}.wav"} for n in range(3)]
    left_out = {**rows[3], "_skipme": True}
    write_lines(folder / "manifest_0.jsonl", *gone, *rows[:3], *segments, left_out, rows[4])
    write_tar(folder / "audio_1.tar", [("lone.wav", wav_bytes(0.1))])
    path = folder / "audio_2.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    return one


@pytest.mark.parametrize("groups", [1, 5])
def test_reading_resumes_behind_any_event(module_of, faulty, groups, tmp_path):
    sampler = module_of(faulty, groups=groups).prepared().sampler
    (pool,) = sampler.pools
    rows = read_rows(tmp_path / "manifest_0.jsonl")
    write_lines(tmp_path / "manifest_0.jsonl", *rows[:-1], {**rows[-1], "duration": -1})

    def events(start, count):
        reader = PoolReader(pool, pool.order(groups))
        found = reader.events(start)
        some = [next(found) for _ in range(count)]
        found.close()
        return [(one.place, getattr(one.what, "cause", ""), one.what.id) for one in some]

    seen = set()
    for group in range(groups):
        whole = events(StreamPlace(group), 30)
        seen |= {one[1:] for one in whole}
        for number in range(0, 29, 1 if groups == 1 else 4):
            place = whole[number][0]
            after = place._replace(taken=place.taken + 1)
            assert events(after, 29 - number) == whole[number + 1 :]
    causes = Counter(cause for cause, _ in seen)
    assert causes["missing"] == 3 + 5 and causes["no_row"] == 1 and causes["bad_row"] == 1
    assert causes["truncated"] >= 1 and ("", "s00m01-sub1.wav") in seen


@pytest.mark.slow  # many short runs
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    stop=strategies.integers(0, 40),
    hosts=strategies.sampled_from([(1, 2), (2, 4), (4, 1), (2, 1)]),
    reach=strategies.integers(2, 60),
    seed=strategies.integers(0, 99),
)
def test_a_run_stopped_anywhere_resumes_on_other_hosts(tokenizer, eight, stop, hosts, reach, seed):
    module_of = partial(stream_module, tokenizer, seed=seed, shuffle_buffer_size=reach)
    streams = streams_of(module_of, hosts[0], eight)
    global_batches(streams, stop)
    state = merged(streams)
    expected = global_batches(streams, 50)
    closing(streams)
    streams = streams_of(module_of, hosts[1], eight, state=state)
    assert_equal(global_batches(streams, 50), expected)
    closing(streams)


# --- the schedule ---


def test_buckets_come_as_often_as_they_should_in_any_stretch():
    shares = step_shares(np.asarray([60.0, 30.0, 10.0]), np.asarray([8.0, 4.0, 1.0]))
    np.testing.assert_allclose(shares, [0.3, 0.3, 0.4])
    schedule = Schedule(shares=tuple(shares), seed=7)
    drawn = np.asarray([schedule.bucket(step) for step in range(3000)])
    for start in (0, 1000, 2500):
        counts = np.bincount(drawn[start : start + 500], minlength=3)
        np.testing.assert_allclose(counts, [150, 150, 200], atol=4)
    other = [Schedule(shares=tuple(shares), seed=8).bucket(step) for step in range(50)]
    assert other != drawn[:50].tolist()
