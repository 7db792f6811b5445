"""Streams of remote tars, and of SHAR."""

import json
import logging
from collections import Counter
from functools import partial

import numpy as np
import pytest

from speechlm2_jax.data.storage import retries
from tests.data_pipeline.http_server import serving
from tests.data_pipeline.small_corpus import TAG, wav_bytes
from tests.data_pipeline.small_streams import (
    assert_equal,
    closing,
    entry,
    global_batches,
    merged,
    stream_module,
    streams_of,
    write_shards,
)


@pytest.fixture
def module_of(tokenizer):
    """Makes a module over a stream."""
    return partial(stream_module, tokenizer)


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
