"""Recordings that cannot be used: replaced, counted by cause and source, listed, limited."""

import json
import logging
import os
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.conversations import AudioClip
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.manifest_watch import manifest_files
from speechlm2_jax.data.time_limit import TimeLimit
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import frames, write_manifest

ROWS = 60
BROKEN = {"a07", "a21", "a40", "b03", "b33"}
"""Of 120; two of them are missing, the others are no audio."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two manifests of 60 recordings each; some cannot be used."""
    folder = tmp_path_factory.mktemp("faulty")
    manifests = []
    for letter in "ab":
        rows = []
        for n in range(ROWS):
            name, samples = f"{letter}{n:02d}", 4000 + 160 * n
            rows.append({"audio_filepath": f"{name}.wav", "duration": samples / 16000})
            rows[-1] |= {"text": "x", "id": name, "sampling_rate": 16000}
            wave = np.full(samples, (n + 1) / 200, np.float32)
            if name not in BROKEN:
                soundfile.write(folder / f"{name}.wav", wave, 16000, subtype="FLOAT")
            elif name not in ("a07", "b03"):
                (folder / f"{name}.wav").write_bytes(b"broken" * 50)
        manifests.append(write_manifest(folder / f"{letter}.jsonl", rows))
    return manifests


@pytest.fixture
def make(sources, tokenizer):
    def one(errors=None, groups=1, own=None, which="train_ds", **keys):
        entries = [{"manifest_filepath": str(path)} for path in sources]
        cfg = {"input_cfg": entries, "prompt_format": "qwen", "token_equivalent_duration": 0.08}
        cfg |= {"batch_size": 4, "shuffle": True, **keys}
        module = DataModule({which: cfg}, tokenizer, SALMDataset(tokenizer))
        module.setup(frame_count=frames, groups=groups, own_groups=own)
        module.keep_errors(errors)
        return module

    return one


def epoch_of(module, state=None):
    """The batches of one epoch and the states after them."""
    stream = module.train_batches(state)
    found = []
    for batch in stream:
        if stream.get_state()["epoch"]:
            return found
        found.append((batch, json.loads(json.dumps(stream.get_state()))))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batches_stay_full_and_each_fault_is_counted_and_listed_once(make, tmp_path, sources):
    errors = tmp_path / "data_errors.jsonl"
    module = make(errors)
    batches = [batch for batch, _ in epoch_of(module)]
    assert all(len(batch.ids) == 4 for batch in batches) and len(batches) == 30
    assert all(len(set(batch.ids)) == 4 for batch in batches)
    met = Counter(i for batch in batches for i in batch.ids)
    assert set(met) == {f"{x}{n:02d}" for x in "ab" for n in range(ROWS)} - BROKEN
    assert module.dropped == {"missing": 2, "unreadable": 3}
    rows = lines(errors)
    assert {row["id"] for row in rows} == BROKEN and len(rows) == 5
    for row in rows:
        assert row["source"] == str(sources["ab".index(row["id"][0])])
        assert row["path"].endswith(f"{row['id']}.wav") and row["path"] in row["message"]
        assert row["cause"] == ("missing" if row["id"] in ("a07", "b03") else "unreadable")
        assert row["replaced_by"] in met and row["replaced_by"][0] == row["id"][0]
        assert met[row["replaced_by"]] > 1
        assert row["replaced_by"] in batches[row["position"] - 1].ids
        assert (row["set"], row["epoch"]) == ("train_ds", 0)
    assert met.total() == 120
    table = module.errors_by_source().splitlines()
    # of 60 of the epoch, and a few of the next one
    assert table[0].startswith(f"  {sources[0]}: 2 unreadable of 6") and len(table) == 4


def test_a_replacement_is_of_the_same_bucket_and_holds_its_own_samples(make):
    module = make(use_bucketing=True, num_buckets=4)
    planned = {bucket.name: bucket for bucket in module.plan().buckets}
    for batch, _ in epoch_of(module):
        lengths = batch.arrays.audio_lengths[0]
        assert (lengths > 0).sum() == len(batch.ids)
        for name, wave, length in zip(batch.ids, batch.arrays.audio[0], lengths, strict=False):
            number = int(name[1:])
            assert length == 4000 + 160 * number and wave[0] == pytest.approx((number + 1) / 200)
        assert lengths.max() <= planned[batch.bucket].shape.samples


def test_resuming_gives_the_same_replacements_and_no_line_twice(make, tmp_path):
    errors = tmp_path / "data_errors.jsonl"
    whole = epoch_of(make(errors))
    expected = lines(errors)
    for at in (0, 11, 29):
        module = make(errors, num_workers=3)
        rest = epoch_of(module, whole[at][1])
        assert [b.ids for b, _ in rest] == [b.ids for b, _ in whole[at + 1 :]]
        for (one, _), (other, _) in zip(rest, whole[at + 1 :], strict=True):
            np.testing.assert_array_equal(one.arrays.audio, other.arrays.audio)
        assert lines(errors) == expected
        assert module.dropped == {"missing": 2, "unreadable": 3}
    epoch_of(make(errors))  # a run from the start begins the list anew
    assert lines(errors) == expected


def test_a_host_that_reads_one_group_gets_the_same_replacements(make):
    whole = make(groups=2)
    half = make(groups=2, own=[1])
    for (one, _), (other, _) in zip(epoch_of(whole), epoch_of(half), strict=True):
        np.testing.assert_array_equal(one.arrays.audio[1], other.arrays.audio[1])
        np.testing.assert_array_equal(one.arrays.tokens[1], other.arrays.tokens[1])


def test_validation_masks_and_replaces_nothing(make, tmp_path):
    errors = tmp_path / "data_errors.jsonl"
    module = make(errors, which="validation_ds", shuffle=False)
    for _ in range(2):
        ids = [i for b in module.validation_batches()["default"] for i in b.ids]
        assert len(ids) == len(set(ids)) == 115
    assert len(lines(errors)) == 5
    assert {row["replaced_by"] for row in lines(errors)} == {None}
    assert {row["set"] for row in lines(errors)} == {"validation_ds.default"}


def test_too_many_faults_stop_the_run_with_a_table(make, sources, tmp_path):
    with pytest.raises(SettingsError) as caught:
        for _ in range(5):
            list(islice(make(max_error_rate=0.02).train_batches(), 200))
    first, *table = str(caught.value).splitlines()
    assert first.startswith("data.train_ds.max_error_rate: ") and "the limit is 2.0%" in first
    assert first.endswith("%:") and all(line.endswith(";") for line in table[:-1])
    assert any(f"{sources[0]}: 2 unreadable of " in line for line in table)
    assert any(f"{sources[1]}: 1 missing of " in line for line in table)
    list(islice(make(max_error_rate=0.2).train_batches(), 60))


def test_the_rate_is_that_of_the_last_conversations():
    from speechlm2_jax.data.faults import Dropped, ErrorRate

    rate = ErrorRate("data.train_ds", 0.1)
    rate.add(99, 99, Dropped())  # too few to tell
    rate = ErrorRate("data.train_ds", 0.1)
    for _ in range(100):
        rate.add(100, 10, Dropped())
    rate.add(900, 0, Dropped())
    rate.add(80, 80, Dropped())
    with pytest.raises(SettingsError, match="12.0% of the last 1000"):
        rate.add(40, 40, Dropped())


@pytest.fixture
def stalled(monkeypatch):
    """Lets some recordings hang until the test is over."""
    names, freed = set(), threading.Event()
    load = AudioClip.load

    def hang(self, *arguments):
        if self.id in names:
            freed.wait(20)
        return load(self, *arguments)

    monkeypatch.setattr(AudioClip, "load", hang)
    yield names
    freed.set()


def test_a_recording_that_does_not_arrive_is_replaced(make, stalled, tmp_path):
    stalled |= {"a10", "b20"}
    errors = tmp_path / "data_errors.jsonl"
    module = make(errors, read_timeout=0.2)
    batches = [batch for batch, _ in epoch_of(module)]
    assert all(len(batch.ids) == 4 for batch in batches)
    assert module.dropped == {"missing": 2, "unreadable": 3, "timed_out": 2}
    late = {row["id"] for row in lines(errors) if row["cause"] == "timed_out"}
    assert late == stalled


def test_storage_that_is_lost_stops_the_run(make, stalled):
    stalled |= {f"{x}{n:02d}" for x in "ab" for n in range(ROWS)}
    before = time.monotonic()
    with pytest.raises(SettingsError, match=r"the storage does not deliver: 4 .*0.1 s"):
        next(make(read_timeout=0.1).train_batches())
    assert time.monotonic() - before < 5


def test_reads_in_time_are_in_order_and_raise_their_own_errors():
    limit = TimeLimit(5.0)
    assert limit.read_all(range(5), lambda n: n * n, lambda n: -1, str) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        limit.read_all([1, 0], lambda n: 1 / n, lambda n: -1, str)
    freed = threading.Event()
    quick = TimeLimit(0.1)
    results = quick.read_all(
        range(4), lambda n: freed.wait(10) if n == 2 else n, lambda n: "late", str
    )
    freed.set()
    assert results == [0, 1, "late", 3]


def test_noise_that_fails_is_listed_and_drops_no_conversation(make, tmp_path, caplog):
    wave = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(tmp_path / "n.wav", wave, 16000)
    rows = [{"audio_filepath": f"{n}.wav", "duration": 1.0, "sampling_rate": 16000} for n in "nm"]
    manifest = write_manifest(tmp_path / "noise.jsonl", rows)
    errors = tmp_path / "data_errors.jsonl"
    module = make(errors, noise_path=str(manifest), noise_mix_prob=1.0)
    with caplog.at_level(logging.WARNING):
        epoch_of(module)
    assert module.dropped == {"missing": 2, "unreadable": 3}
    noise = [row for row in lines(errors) if row["source"] == "noise_path"]
    assert len(noise) > 20 and {row["path"] for row in noise} == {str(tmp_path / "m.wav")}
    assert caplog.text.count("skipped noise") == 10


def test_a_manifest_that_changes_under_a_run_is_told_once(make, sources, caplog):
    from speechlm2_jax.data import manifest_watch

    module = make()
    stream = module.train_batches()
    next(stream)
    before = sources[0].stat()
    os.utime(sources[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    next(stream)
    assert "changed since" not in caplog.text  # nobody looks at each step
    (watch,) = module._watches.values()
    for second in (1, 2):
        watch.look(time.monotonic() + second * (manifest_watch.EVERY_S + 1))
    (message,) = [m for m in caplog.messages if "changed since" in m]
    assert message.startswith(f"data.train_ds: {sources[0]} changed")


def test_the_manifests_of_every_kind_of_source_are_watched(tmp_path):
    for name in ("part_0.jsonl", "part_1.jsonl", "cuts.000000.jsonl.gz"):
        (tmp_path / name).touch()
    listed = {
        "manifest_filepath": f"{tmp_path}/part_{{0..1}}.jsonl",
        "shar_path": str(tmp_path),
    }
    found = [manifest_files(InputConfig(**{key: path})) for key, path in listed.items()]
    found.append(
        manifest_files(InputConfig(shar_path={"cuts": f"{tmp_path}/cuts.000000.jsonl.gz"}))
    )
    shar = (f"{tmp_path}/cuts.000000.jsonl.gz",)
    assert found == [(f"{tmp_path}/part_0.jsonl", f"{tmp_path}/part_1.jsonl"), shar, shar]


def test_tars_are_watched_too(tmp_path):
    names = ("cuts.000000.jsonl.gz", "recording.000000.tar", "target_audio.000000.tar")
    for name in names:
        (tmp_path / name).touch()
    files = tuple(f"{tmp_path}/{name}" for name in names)
    shar = {"cuts": files[0], "recording": files[1], "target_audio": files[2]}
    assert manifest_files(InputConfig(shar_path=str(tmp_path))) == files
    assert manifest_files(InputConfig(shar_path=shar)) == files
    remote = "http://host/audio_1.tar"
    tarred = {"manifest_filepath": "m.jsonl", "tarred_audio_filepaths": ["a_0.tar", remote]}
    assert manifest_files(InputConfig(type="nemo_tarred", **tarred)) == ("m.jsonl", "a_0.tar")
