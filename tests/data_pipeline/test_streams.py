"""Streams of tars: who reads what, in which order, and where a stopped run resumes."""

import json
import logging
import threading
from collections import Counter
from dataclasses import fields

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from speechlm2_jax.data import DataModule
from speechlm2_jax.data.storage import retries
from speechlm2_jax.data.streams import feed
from speechlm2_jax.data.streams.events import PoolReader, StreamPlace
from speechlm2_jax.data.streams.group import MOST_OVERFULL, GroupStream
from speechlm2_jax.data.streams.order import ShardOrder
from speechlm2_jax.data.streams.schedule import Schedule, step_shares
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.http_server import serving
from tests.data_pipeline.small_corpus import (
    TAG,
    frames,
    read_rows,
    wav_bytes,
    write_lines,
    write_tar,
)

RATE = 16000


def write_shards(folder, shards, members, more=None):
    """Shards of recordings of 0.1 to 0.5 s; the level of each is its number."""
    random = np.random.default_rng(3)
    for shard in range(shards):
        names = [f"s{shard:02d}m{n:02d}.wav" for n in range(members)]
        seconds = random.choice([0.1, 0.2, 0.3, 0.5], members).tolist()
        data = [
            (name, wav_bytes(s, (shard * members + n + 1) / 1000))
            for n, (name, s) in enumerate(zip(names, seconds, strict=True))
        ]
        write_tar(folder / f"audio_{shard}.tar", data)
        rows = [
            {"audio_filepath": name, "duration": s, "text": "x" * int(10 * s), **(more or {})}
            for name, s in zip(names, seconds, strict=True)
        ]
        write_lines(folder / f"manifest_{shard}.jsonl", *rows)
    return entry(folder, shards)


def entry(folder, shards, **more):
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{folder}/manifest_{{0..{shards - 1}}}.jsonl",
        "tarred_audio_filepaths": f"{folder}/audio_{{0..{shards - 1}}}.tar",
        "audio_locator_tag": TAG,
        **more,
    }


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight shards of six members."""
    return write_shards(tmp_path_factory.mktemp("eight"), 8, 6)


@pytest.fixture
def module_of(tokenizer):
    """Makes a module over a stream, for some groups and those of them that are read here."""

    def make(*entries, groups=4, own=None, **settings):
        train = {
            **{"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2},
            **{"shuffle": True, "seed": 3, "shuffle_buffer_size": 12, "stream": True},
            **{"input_cfg": list(entries), **settings},
        }
        module = DataModule({"train_ds": train}, tokenizer)
        module.setup(frame_count=frames, groups=groups, own_groups=own)
        return module

    return make


def streams_of(module_of, hosts, *entries, groups=4, state=None, **settings):
    """The batches of each host, which hold groups as a mesh deals them out."""
    size = groups // hosts
    made = [
        module_of(*entries, groups=groups, own=range(h * size, (h + 1) * size), **settings)
        for h in range(hosts)
    ]
    return [module.train_batches(state) for module in made]


def global_batches(streams, count):
    """So many batches: the bucket, the ids, and the arrays of each group."""
    found, size = [], streams[0]._reader.sampler.groups // len(streams)
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        assert len({part.bucket for part in parts}) == 1
        arrays = {
            field.name: np.concatenate(
                [
                    np.asarray(getattr(part.arrays, field.name))[h * size : (h + 1) * size]
                    for h, part in enumerate(parts)
                ]
            )
            for field in fields(parts[0].arrays)
            if not field.metadata.get("static")
        }
        found.append((parts[0].bucket, [i for part in parts for i in part.ids], arrays))
    return found


def merged(streams):
    states = [stream.get_state() for stream in streams]
    return json.loads(json.dumps(streams[0].joined_state(states)))


def closing(streams):
    for stream in streams:
        stream.close()


def assert_equal(one, other):
    for (bucket, ids, arrays), (other_bucket, other_ids, others) in zip(one, other, strict=True):
        assert bucket == other_bucket and ids == other_ids
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], err_msg=name)


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


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)
    with serving() as found:
        yield found


def test_remote_tars_are_streams_read_from_front_to_end(module_of, tmp_path, site, caplog):
    one = write_shards(tmp_path, 3, 5)
    for path in tmp_path.iterdir():
        if path.is_file():
            site.put(path.name, path.read_bytes())
    caplog.set_level(logging.INFO)
    expected = None
    for faults in ([], ["drop", 500, "drop"]):
        site.faults["/audio_1.tar"] = list(faults)
        stream = module_of(entry(site.url, 3), groups=1, stream=None).train_batches()
        site.requests.clear()
        found = global_batches([stream], 20)
        stream.close()
        tars = [wanted for path, wanted in site.requests if path.endswith(".tar")]
        if not faults:
            assert set(tars) == {"bytes=0-"}
        expected = expected or found
        assert_equal(found, expected)
    assert "its tars are remote, so they are read from front to end" in caplog.text
    stream = module_of(one, groups=1, stream=True).train_batches()
    local = global_batches([stream], 20)
    stream.close()
    assert_equal(local, expected)


@pytest.mark.slow  # waits
def test_a_remote_shard_that_hangs_or_is_gone_is_passed_over(module_of, tmp_path, site):
    write_shards(tmp_path, 3, 5)
    for path in tmp_path.iterdir():
        if path.is_file():
            site.put(path.name, path.read_bytes())
    site.faults["/audio_0.tar"] = ["stall"] * 99
    site.files.pop("/audio_2.tar")
    module = module_of(entry(site.url, 3), groups=1, read_timeout=0.3, shuffle=False)
    module.keep_errors(tmp_path / "errors.jsonl")
    stream = module.train_batches()
    ids = Counter(i for _, ids, _ in global_batches([stream], 8) for i in ids)
    stream.close()
    rows = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    found = {(row["id"][:3], row["cause"]) for row in rows}
    assert found == {("s00", "timed_out"), ("s02", "missing")}
    assert {i[:3] for i in ids} == {"s01"} and ids.total() == 16


@pytest.mark.slow  # imports Lhotse, writes and reads SHAR
def test_shar_streams_take_packed_and_other_recordings(module_of, tmp_path):
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    cuts = []
    for n in range(8):
        path = tmp_path / f"r{n}.wav"
        path.write_bytes(wav_bytes(0.2, (n + 1) / 100))
        recording = Recording.from_file(path)
        texts = [SupervisionSegment(f"s{n}", recording.id, 0, 0.2, text="x")]
        one = {"start": 0, "duration": 0.2, "channel": 0, "recording": recording}
        cuts.append(MonoCut(f"c{n}", supervisions=texts, **one))
    (tmp_path / "shar").mkdir()
    CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", {"recording": "wav"}, shard_size=3)
    last = tmp_path / "shar" / "recording.000002.tar"
    last.unlink()
    CutSet.from_cuts(cuts[6:]).to_file(tmp_path / "shar" / "cuts.000002.jsonl.gz")
    one = {"type": "lhotse_shar", "shar_path": str(tmp_path / "shar"), "audio_locator_tag": TAG}
    streams = streams_of(module_of, 1, one, groups=1, shuffle=False)
    found = global_batches(streams, 3)
    state = merged(streams)
    rest = global_batches(streams, 5)
    closing(streams)
    ids = [i for _, ids, _ in [*found, *rest] for i in ids]
    assert set(ids[:8]) == {f"c{n}" for n in range(8)} == set(ids[8:])
    for _, ids, arrays in found:
        levels = [round(float(np.abs(wave).max()) * 100) for wave in arrays["audio"][0]]
        assert levels == [int(i[1:]) + 1 for i in ids]
    streams = streams_of(module_of, 1, one, groups=1, shuffle=False, state=state)
    assert_equal(global_batches(streams, 5), rest)
    closing(streams)


@pytest.mark.slow  # many short runs
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    stop=strategies.integers(0, 40),
    hosts=strategies.sampled_from([(1, 2), (2, 4), (4, 1), (2, 1)]),
    reach=strategies.integers(2, 60),
    seed=strategies.integers(0, 99),
)
def test_a_run_stopped_anywhere_resumes_on_other_hosts(tokenizer, eight, stop, hosts, reach, seed):
    def module_of(*entries, groups, own, **settings):
        train = {
            **{"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2},
            **{"shuffle": True, "seed": seed, "shuffle_buffer_size": reach, "stream": True},
            "input_cfg": [*entries],
        }
        module = DataModule({"train_ds": train}, tokenizer)
        module.setup(frame_count=frames, groups=groups, own_groups=own)
        return module

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
