"""Addresses of storage: reading by ranges, faults and time limits, and what may be read."""

import json
import time

import fsspec
import pytest

from speechlm2_jax.data import DataModule, paths
from speechlm2_jax.data.audio_errors import AudioError
from speechlm2_jax.data.storage import retries
from speechlm2_jax.data.storage.access import StorageAccess, using
from speechlm2_jax.data.storage.addresses import is_below, normalised
from speechlm2_jax.data.storage.downloads import local_copy, origin_of
from speechlm2_jax.data.storage.errors import StorageError
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.http_server import serving
from tests.data_pipeline.small_corpus import (
    TAG,
    frames,
    read_input_cfg,
    refusal,
    wav_bytes,
    write_tar,
)

RATE = 16000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def server():
    with serving() as site:
        yield site


@pytest.fixture
def site(server):
    server.files.clear()
    server.faults.clear()
    server.requests.clear()
    server.has_ranges = True
    return server


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def row(name, **more):
    return {"audio_filepath": name, "duration": 0.5, "text": f"text of {name}", **more}


def tar_bytes(tmp_path, *names):
    members = [(name, wav_bytes(0.5, 0.1 * (n + 1))) for n, name in enumerate(names)]
    path = tmp_path / "made.tar"
    write_tar(path, members)
    return path.read_bytes()


def entry(folder, **more):
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{folder}/manifest_{{0..1}}.jsonl",
        "tarred_audio_filepaths": f"{folder}/audio_{{0..1}}.tar",
        **more,
    }


def put_shards(put, tmp_path):
    for n in range(2):
        names = [f"{n}a.wav", f"{n}b.wav"]
        put(f"audio_{n}.tar", tar_bytes(tmp_path, *names))
        put(f"manifest_{n}.jsonl", lines(*map(row, names)))


@pytest.fixture(params=["http", "memory"])
def folder(request, tmp_path):
    """The address of a folder of two shards."""
    if request.param == "http":
        site = request.getfixturevalue("site")
        put_shards(site.put, tmp_path)
        return site.url
    files = request.getfixturevalue("memory")
    put_shards(lambda name, data: files.pipe(f"/data/{name}", data), tmp_path)
    return "memory://data"


def test_remote_tars_are_read_by_their_headers_and_members_by_ranges(folder):
    (source,) = read_input_cfg(entry(folder))
    assert [c.id for c in source.conversations] == ["0a.wav", "0b.wav", "1a.wav", "1b.wav"]
    waves = [c.clips[0].load(RATE) for c in source.conversations]
    assert [len(wave) for wave in waves] == [8000] * 4
    assert [round(float(wave[0]), 1) for wave in waves] == [0.1, 0.2, 0.1, 0.2]
    assert source.conversations[0].where == f"{folder}/manifest_0.jsonl line 1"


def test_only_the_bytes_of_a_member_are_asked_for(site, tmp_path):
    put_shards(site.put, tmp_path)
    (source,) = read_input_cfg(entry(site.url))
    site.requests.clear()
    clip = source.conversations[1].clips[0]
    clip.load(RATE)
    start, size = clip.byte_range
    wanted = f"bytes={start - 512}-{start + size - 1}"  # its header and its bytes
    assert site.requests == [("/audio_0.tar", wanted)]


def test_a_second_start_asks_for_versions_alone(site, tmp_path, monkeypatch):
    put_shards(site.put, tmp_path)
    read_input_cfg(entry(site.url))
    monkeypatch.setattr("speechlm2_jax.data.storage.downloads._FRESH_S", 0.0)
    site.requests.clear()
    read_input_cfg(entry(site.url))
    assert [one for one in site.requests if one[1] != "bytes=0-0"] == []
    changed = lines(row("0a.wav", text="new"), row("0b.wav"))
    site.put("manifest_0.jsonl", changed)
    (source,) = read_input_cfg(entry(site.url))
    assert source.conversations[0].response == "new"


def test_recordings_lie_beside_a_remote_manifest(folder, site, memory):
    put = site.put if folder == site.url else lambda n, d: memory.pipe(f"/data/{n}", d)
    put("wavs/a.wav", wav_bytes(0.5, 0.3))
    put("plain.jsonl", lines(row("wavs/a.wav")))
    (source,) = read_input_cfg({"manifest_filepath": f"{folder}/plain.jsonl"})
    clip = source.conversations[0].clips[0]
    assert clip.path == f"{folder}/wavs/a.wav" and len(clip.load(RATE)) == 8000


@pytest.mark.slow  # imports Lhotse, writes and reads SHAR
def test_shar_in_a_store_and_its_files_on_a_web_server(memory, site, tmp_path):
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    (tmp_path / "a.wav").write_bytes(wav_bytes(0.5, 0.2))
    recording = Recording.from_file(tmp_path / "a.wav")
    one = [SupervisionSegment("s", "a", 0, 0.5, text="one")]
    cut = MonoCut("c", start=0, duration=0.5, channel=0, recording=recording, supervisions=one)
    (tmp_path / "shar").mkdir()
    CutSet.from_cuts([cut]).to_shar(tmp_path / "shar", {"recording": "flac"})
    names = ["cuts.000000.jsonl.gz", "recording.000000.tar"]
    for name in names:
        memory.pipe(f"/shar/{name}", (tmp_path / "shar" / name).read_bytes())
        site.put(name, (tmp_path / "shar" / name).read_bytes())
    listed = {"cuts": [f"{site.url}/{names[0]}"], "recording": [f"{site.url}/{names[1]}"]}
    for place in ("memory://shar", listed):
        (source,) = read_input_cfg({"type": "lhotse_shar", "shar_path": place})
        assert len(source.conversations[0].clips[0].load(RATE)) == 8000
    message = refusal({"type": "lhotse_shar", "shar_path": site.url})
    assert "a web server does not list its files" in message


def test_a_file_of_entries_may_be_remote(memory, tmp_path):
    put_shards(lambda name, data: memory.pipe(f"/data/{name}", data), tmp_path)
    memory.pipe("/data/entries.yaml", json.dumps([entry("memory://data")]).encode())
    (source,) = read_input_cfg({"type": "group", "input_cfg": "memory://data/entries.yaml"})
    assert len(source.conversations) == 4


FAULTS = [
    ([500, 503], 0, None),
    (["drop"], 0, None),
    (["stall"], 0, None),
    ([500] * 9, 0, "unreachable"),
    (["drop"] * 9, 0, "incomplete"),
    (["stall"] * 9, 0, "timed_out"),
    ([404], 0, "missing"),
    ([403], 0, "forbidden"),
]


@pytest.mark.parametrize(("faults", "_", "cause"), FAULTS, ids=lambda v: str(v)[:12])
def test_faults_that_pass_are_tried_again_and_others_get_their_cause(site, faults, _, cause):
    from speechlm2_jax.data.audio_location import AudioLocation

    data = wav_bytes(0.5)
    address = site.put("a.wav", data)
    site.faults["/a.wav"] = list(faults)
    location = AudioLocation(address, (0, len(data)), storage=StorageAccess(limit_s=0.6))
    if cause is None:
        assert location.source("a").read() == data
        return
    began = time.monotonic()
    with pytest.raises(AudioError) as caught:
        location.source("a")
    assert caught.value.cause == cause and caught.value.path == address
    assert time.monotonic() - began < 2.0


def test_a_dropped_connection_is_taken_up_where_it_was(site):
    data = bytes(range(256)) * 4096
    address = site.put("a.tar", data)
    site.faults["/a.tar"] = ["drop", 500, "trickle", "drop"]
    assert b"".join(StorageAccess(limit_s=1.0).open(address).stream(0)) == data
    starts = [int(wanted[6:-1]) for _, wanted in site.requests]
    assert starts == sorted(starts) and starts[0] == 0 < starts[-1] < len(data)


def test_a_server_without_ranges_serves_whole_files_alone(site):
    site.has_ranges = False
    data = b"0123456789"
    file = StorageAccess(limit_s=1.0).open(site.put("a", data))
    assert file.state().size == 10 and b"".join(file.stream(4)) == b"456789"
    with pytest.raises(StorageError, match="no ranges of bytes"):
        file.read(3, 2)


def test_empty_files_and_ends(site, memory):
    site.put("a", b"")
    memory.pipe("/d/a", b"")
    for address in (f"{site.url}/a", "memory://d/a"):
        file = StorageAccess(limit_s=1.0).open(address)
        assert file.state().size == 0 and file.read(0, 5) == b"" == b"".join(file.stream(0))


def test_a_copy_knows_its_origin_and_the_last_two_versions_stay(memory):
    for text in (b"a", b"bb", b"ccc"):
        memory.pipe("/d/m.jsonl", text)
        path = local_copy("memory://d/m.jsonl", StorageAccess(limit_s=len(text)))
        assert path.read_bytes() == text and origin_of(path) == "memory://d/m.jsonl"
    assert len(list(path.parent.parent.iterdir())) == 3  # and the address


def test_a_missing_package_is_named():
    message = refusal({"manifest_filepath": "gs://bucket/m.jsonl"})
    assert message.endswith("needs the package gcsfs; python -m pip install gcsfs")


# --- what may be read ---


def test_addresses_have_one_spelling():
    assert normalised("HTTP://Host:80/a/../b/./c") == "http://host/b/c"
    assert normalised("https://h/a%20b?x=1#y") == "https://h/a%20b?x=1"
    assert normalised("s3://Bucket/a/../b") == "s3://Bucket/b"
    wrong = [
        "ftp://h/a",
        "http://u@h/a",
        "http://h\\@e/a",
        "s3://b/%2e%2e/a",
        "zip://a::http://e/b",
    ]
    for address in [
        *wrong,
        "local:///etc/passwd",
        "http:///a",
        "s3://b/%252e%252e/a",
        "s3://b/a\nb",
    ]:
        with pytest.raises(SettingsError):
            normalised(address)
    root = normalised("https://host/data")
    inside, outside = ["", "/", "/a", "/a/b"], ["x", "/../a"]
    assert all(is_below(normalised(root + end), root) for end in inside)
    assert not any(is_below(normalised(root + end), root) for end in outside)
    assert not is_below(normalised("https://host.evil/data/a"), root)
    assert not is_below(normalised("http://host/data/a"), root)


@pytest.fixture
def allowed(tmp_path, site):
    """Keys that allow one folder and a part of the server."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.wav").write_bytes(wav_bytes(0.5))
    (tmp_path / "secret.wav").write_bytes(wav_bytes(0.5))
    return {"allowed_roots": [str(tmp_path / "data"), f"{site.url}/open"]}


def test_a_manifest_reads_nothing_outside_of_allowed_roots(tmp_path, site, allowed):
    folder = tmp_path / "data"
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    site.put("open/b.wav", wav_bytes(0.5))
    fine = ["a.wav", f"{folder}/a.wav", f"file://{folder}/a.wav", f"{site.url}/open/b.wav"]
    wrong = [
        *(
            "/etc/passwd",
            "file:///etc/passwd",
            "../secret.wav",
            "link.wav",
            f"{folder}/../secret.wav",
        ),
        *(f"{site.url}/b.wav", f"{site.url}/open/../b.wav", f"{site.url}/opener/b.wav"),
        *("http://169.254.169.254/latest", "s3://bucket/a.wav", "~/a.wav"),
    ]
    manifest = folder / "m.jsonl"
    for name in fine:
        manifest.write_bytes(lines(row(name)))
        (source,) = read_input_cfg({"manifest_filepath": str(manifest)}, **allowed)
        assert len(source.conversations[0].clips[0].load(RATE)) == 8000
    for name in wrong:
        manifest.write_bytes(lines(row(name)))
        message = refusal({"manifest_filepath": str(manifest)}, **allowed)
        assert "lies in none of allowed_roots" in message and "m.jsonl line 1" in message


def test_cuts_dialogs_and_entries_are_restricted_alike(tmp_path, allowed):
    folder, secret = tmp_path / "data", str(tmp_path / "secret.wav")
    audio = {"from": "User", "type": "audio", "value": secret, "duration": 0.5}
    dialog = {"conversations": [audio, {"from": "Assistant", "type": "text", "value": "x"}]}
    source = {"type": "file", "channels": [0], "source": secret}
    recording = {"id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 8000}
    recording |= {"duration": 0.5, "channel_ids": [0]}
    cut = {"id": "c", "start": 0, "duration": 0.5, "channel": 0, "supervisions": []}
    cut |= {"recording": recording, "type": "MonoCut"}
    for one in (dialog, cut):
        (folder / "m.jsonl").write_bytes(lines(one))
        message = refusal({"manifest_filepath": str(folder / "m.jsonl")}, **allowed)
        assert "lies in none of allowed_roots" in message
    (tmp_path / "m.jsonl").write_bytes(lines(row("data/a.wav")))
    message = refusal({"manifest_filepath": str(tmp_path / "m.jsonl")}, **allowed)
    assert "m.jsonl: lies in none of allowed_roots" in message


def test_redirects_are_checked_before_they_are_followed(tmp_path, site, allowed):
    site.put("open/to.wav", wav_bytes(0.5))
    site.put("secret.wav", b"secret")
    (tmp_path / "data" / "m.jsonl").write_bytes(lines(row(f"{site.url}/open/b.wav")))
    (source,) = read_input_cfg({"manifest_filepath": f"{tmp_path}/data/m.jsonl"}, **allowed)
    clip = source.conversations[0].clips[0]
    site.faults["/open/b.wav"] = [f"{site.url}/open/to.wav"]
    assert len(clip.load(RATE)) == 8000
    for target in (f"{site.url}/secret.wav", "http://169.254.169.254/x", "ftp://127.0.0.1/x"):
        site.faults["/open/b.wav"] = [target]
        with pytest.raises(AudioError) as caught:
            clip.load(RATE)
        assert caught.value.cause == "not_allowed"
    assert "/secret.wav" not in [path for path, _ in site.requests]
    site.faults["/open/b.wav"] = [f"{site.url}/secret.wav"]
    assert StorageAccess().whole(f"{site.url}/open/b.wav") == b"secret"


def test_schemes_are_restricted(tmp_path, memory):
    memory.pipe("/d/a.wav", wav_bytes(0.5))
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(lines(row("memory://d/a.wav")))
    one = {"manifest_filepath": str(manifest)}
    read_input_cfg(one, allowed_schemes=["file", "memory"])
    message = refusal(one, allowed_schemes=["file"])
    assert "memory is not one of allowed_schemes (file)" in message
    assert "file is not one of allowed_schemes" in refusal(one, allowed_schemes=["s3"])
    assert "'zip' is not one of file, http" in refusal(one, allowed_schemes=["zip"])


def test_what_is_read_later_keeps_what_was_allowed(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(b"")
    with using(StorageAccess(roots=(str(tmp_path),))):
        finder = paths.Finder(manifest)
    assert finder("a.wav") == str(tmp_path / "a.wav")
    with pytest.raises(StorageError):
        finder("/etc/passwd")


def test_faults_of_storage_are_listed_and_the_data_block_restricts_all_sets(
    tmp_path, site, tokenizer
):
    rows = [row(f"{n}.wav") for n in range(6)]
    for one in rows:
        site.put(one["audio_filepath"], wav_bytes(0.5))
    site.put("m.jsonl", lines(*rows))
    common = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 3}
    entries = [{"manifest_filepath": f"{site.url}/m.jsonl", "audio_locator_tag": TAG}]
    data = {"train_ds": {**common, "input_cfg": entries, "read_timeout": 0.5}}
    site.files.pop("/1.wav")
    site.faults["/2.wav"] = [500] * 9
    module = DataModule(data, tokenizer)
    module.setup(frame_count=frames)
    module.keep_errors(tmp_path / "errors.jsonl")
    stream = module.train_batches()
    assert [len(next(stream).ids) for _ in range(2)] == [3, 3]
    stream.close()
    found = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [(one["id"], one["cause"]) for one in found] == [("1", "missing"), ("2", "unreachable")]
    assert found[0]["path"] == f"{site.url}/1.wav" and found[0]["source"] == f"{site.url}/m.jsonl"
    with pytest.raises(SettingsError, match=r"m\.jsonl: lies in none of allowed_roots"):
        DataModule({**data, "allowed_roots": [str(tmp_path)]}, tokenizer)
