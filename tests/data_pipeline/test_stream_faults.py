"""Streams whose files fail: no row meets the recording of another, and each is counted once."""

import tarfile
from collections import Counter
from io import BytesIO

import pytest

from speechlm2_jax.data import DataModule
from speechlm2_jax.data.conversations import Conversation
from speechlm2_jax.data.streams.events import PoolReader, StreamPlace
from speechlm2_jax.data.tar_headers import members_of
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.http_server import serving
from tests.data_pipeline.small_corpus import TAG, frames, wav_bytes, write_lines, write_tar


def write_shards(folder, shards, members):
    """Shards whose members have the same names in each; the size of a recording is its own."""
    for shard in range(shards):
        write_tar(
            folder / f"audio_{shard}.tar",
            [(f"{n}.wav", wav_bytes(0.1 + shard / 100)) for n in range(members)],
        )
        rows = [
            {"audio_filepath": f"{n}.wav", "duration": 0.1 + shard / 100, "text": str(shard)}
            for n in range(members)
        ]
        write_lines(folder / f"manifest_{shard}.jsonl", *rows)


@pytest.fixture
def module_of(tokenizer):
    def make(folder, shards, groups=1, **settings):
        one = {
            "type": "nemo_tarred",
            "manifest_filepath": f"{folder}/manifest_{{0..{shards - 1}}}.jsonl",
            "tarred_audio_filepaths": f"{folder}/audio_{{0..{shards - 1}}}.tar",
            "audio_locator_tag": TAG,
        }
        train = {
            **{"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2},
            **{"seed": 3, "stream": True, "input_cfg": [one], **settings},
        }
        module = DataModule({"train_ds": train}, tokenizer)
        module.setup(frame_count=frames, groups=groups)
        return module

    return make


def events(module, groups=1):
    """All of the first epoch, of all groups."""
    (pool,) = module.prepared().sampler.pools
    found = []
    for group in range(groups):
        for event in PoolReader(pool, pool.order(groups)).events(StreamPlace(group)):
            if event.epoch:
                break
            found.append(event.what)
    return found


def texts_and_seconds(found):
    """The shard that the text names, and the shard that the recording is of."""
    made = [what for what in found if isinstance(what, Conversation)]
    texts = [int(one.turns[-1].text) for one in made]
    sizes = [len(clip.data) for one in made for clip in one.clips]
    return texts, [round(((size - 44) / 32000 - 0.1) * 100) for size in sizes]


def test_a_shard_whose_manifest_is_lost_does_not_lend_its_tar_to_the_next(module_of, tmp_path):
    write_shards(tmp_path, 4, 3)
    module = module_of(tmp_path, 4)
    (tmp_path / "manifest_1.jsonl").write_text("no JSON\n")
    found = events(module)
    assert Counter(getattr(what, "cause", "") for what in found) == {"": 9, "bad_row": 1}
    texts, recordings = texts_and_seconds(found)
    assert texts == recordings == [0] * 3 + [2] * 3 + [3] * 3


def test_a_tar_that_fails_behind_what_was_used_of_it_leaves_the_next_alone(
    module_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("speechlm2_jax.data.storage.retries._FIRST_PAUSE_S", 0.001)
    write_shards(tmp_path, 3, 3)
    path = tmp_path / "audio_0.tar"
    broken = path.read_bytes()[:4096] + b"?" * 3_000_000  # no header follows the first member
    path.write_bytes(broken)
    with serving() as site:
        for file in tmp_path.iterdir():
            if file.is_file():
                site.put(file.name, file.read_bytes())
        site.faults["/audio_0.tar"] = ["drop", 500, 500, 500, 500, 500]
        found = events(module_of(site.url, 3, read_timeout=5))
    texts, recordings = texts_and_seconds(found)
    assert texts == recordings == [0] + [1] * 3 + [2] * 3
    assert Counter(getattr(what, "cause", "") for what in found) == {"": 7, "truncated": 2}


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_groups_that_share_a_tar_count_each_row_behind_its_end_once(module_of, tmp_path, cut):
    write_shards(tmp_path, 1, 10)
    path = tmp_path / "audio_0.tar"
    size = 512 + -(-len(wav_bytes(0.1)) // 512) * 512
    path.write_bytes(path.read_bytes()[: cut * size + 1500])
    found = events(module_of(tmp_path, 1, groups=3), groups=3)
    names = {what.id: getattr(what, "cause", "") for what in found}
    assert len(found) == len(names) == 10
    assert [names[f"{n}.wav"] for n in range(10)] == [""] * cut + ["truncated"] * (10 - cut)


def test_the_manifests_of_a_stream_are_watched(module_of, tmp_path, monkeypatch, caplog):
    write_shards(tmp_path, 2, 2)
    stream = module_of(tmp_path, 2).train_batches()
    monkeypatch.setattr("speechlm2_jax.data.manifest_watch.EVERY_S", -1)
    next(stream)
    assert "changed since this run began" not in caplog.text
    path = tmp_path / "manifest_1.jsonl"
    path.write_text(path.read_text() * 2)
    next(stream)
    stream.close()
    assert f"{path} changed since this run began" in caplog.text


def test_manifests_of_a_remote_stream_are_copied_when_their_turn_comes(
    module_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(tmp_path, 40, 2)
    with serving() as site:
        for file in tmp_path.iterdir():
            if file.is_file():
                site.put(file.name, file.read_bytes())
        module_of(site.url, 40, stream=None)
        copied = {path for path, _ in site.requests if path.startswith("/manifest")}
    assert 0 < len(copied) <= 16 + 1


def test_a_stream_of_nothing_tells_why(module_of, tmp_path):
    write_shards(tmp_path, 1, 2)
    (tmp_path / "audio_0.tar").write_bytes(b"?" * 2048)
    stream = module_of(tmp_path, 1).train_batches()
    with pytest.raises(SettingsError, match="an example that can be used: no header at byte 0"):
        next(stream)
    stream.close()


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_tar_that_is_replaced_under_a_run_gives_no_recording_of_another_row(
    module_of, tmp_path, monkeypatch, is_remote
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seconds = [0.1, 0.15, 0.2, 0.25]
    members = [(f"{n}.wav", wav_bytes(s, 0.1 * n)) for n, s in enumerate(seconds)]
    write_tar(tmp_path / "audio_0.tar", members)
    write_tar(tmp_path / "other.tar", members[::-1])
    rows = [
        {"audio_filepath": f"{n}.wav", "duration": s, "text": str(n), "sampling_rate": 16000}
        for n, s in enumerate(seconds)
    ]
    write_lines(tmp_path / "manifest_0.jsonl", *rows)
    with serving() as site:
        for file in tmp_path.iterdir():
            if file.is_file():
                site.put(file.name, file.read_bytes())
        module = module_of(site.url if is_remote else tmp_path, 1, stream=False)
        site.files["/audio_0.tar"] = (tmp_path / "other.tar").read_bytes()
        (tmp_path / "other.tar").replace(tmp_path / "audio_0.tar")
        stream = module.train_batches()
        for _ in range(2):
            assert not next(stream).ids
        stream.close()
    assert module.dropped == {"changed": 4}


@pytest.mark.parametrize("bins", [[36], [[60, 30]]])
def test_what_fits_no_bin_is_no_fault(module_of, tmp_path, bins):
    write_shards(tmp_path, 4, 3)
    long = [{"audio_filepath": f"{n}.wav", "duration": 0.1, "text": "x" * 50} for n in range(3)]
    write_lines(tmp_path / "manifest_1.jsonl", *long)
    bucketing = {"use_bucketing": True, "use_multimodal_sampling": True}
    sizes = {"bucket_duration_bins": bins, "bucket_batch_size": [2], "num_buckets": 1}
    stream = module_of(tmp_path, 4, max_error_rate=0.0, **bucketing, **sizes).train_batches()
    for _ in range(8):
        next(stream)
    stream.close()
    dropped = stream._faults.dropped
    assert dropped.counts == {"longer_than_buckets": 3} and not dropped.by_source


@pytest.mark.parametrize("size", ["-1024", "many", ""])
def test_a_size_that_is_no_size_is_a_damaged_header(size):
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("a.wav")
        info.pax_headers = {"size": size}
        tar.addfile(info)
    tar = buffer.getvalue()

    def read(size, place):
        return tar[place : place + size]

    with pytest.raises(tarfile.ReadError, match="no header at byte 1024"):
        list(members_of(read, len(tar)))
