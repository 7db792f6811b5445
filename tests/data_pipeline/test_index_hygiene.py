"""Builds of an index that meet: other processes, dead ones, full disks and growing manifests."""

import errno
import json
import logging
import subprocess
import sys
import threading
import time

import pytest

from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.index import build, folders, opening, row_count, worker
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import TAG, frames, read_rows, write_manifest

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def manifest(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(row_count, "LARGE_ROWS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = read_rows(corpus / "manifest.jsonl")
    for n, row in enumerate(rows):
        row |= {"audio_filepath": str(corpus / row["audio_filepath"]), "id": f"row{n}"}
    return write_manifest(tmp_path / "m.jsonl", rows)


@pytest.fixture
def builds(monkeypatch):
    """The chunks that are read, one after another."""
    found, read = [], worker.ChunkReader.read

    def counted(self, start, end):
        found.append((start, end))
        return read(self, start, end)

    monkeypatch.setattr(worker.ChunkReader, "read", counted)
    return found


def rows_of(tokenizer, manifest):
    entry = {"manifest_filepath": str(manifest), "audio_locator_tag": TAG}
    train = {"prompt_format": "qwen", "token_equivalent_duration": 0.08, "input_cfg": [entry]}
    module = DataModule({"train_ds": {**train, "batch_size": 2}}, tokenizer, SALMDataset(tokenizer))
    module.setup(frame_count=frames)
    return len(module.prepared().contents)


def waits(call, caplog, until):
    """Runs a call in a thread, which waits for another process until `until` is called."""
    with caplog.at_level(logging.INFO):
        thread = threading.Thread(target=call)
        thread.start()
        deadline = time.monotonic() + 20
        while "another process writes to it; waiting" not in caplog.text:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        until()
        thread.join(20)
    assert not thread.is_alive()


def test_a_start_waits_for_another_process_and_goes_on_when_that_is_killed(
    manifest, tokenizer, caplog
):
    folder = manifest.with_name("m.jsonl.index")
    folder.mkdir()
    left = folder / ".rows.host-1"
    left.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        waits(lambda: rows_of(tokenizer, manifest), caplog, other.kill)
    assert (folder / "rows" / "meta.json").is_file() and not left.exists()


def test_one_of_many_starts_builds(manifest, tokenizer, builds, monkeypatch, caplog):
    found, begun = [], threading.Event()
    read_chunks = build.read_chunks

    def slow(*args):
        begun.set()
        time.sleep(0.3)
        return read_chunks(*args)

    monkeypatch.setattr(opening, "read_chunks", slow)
    call = lambda: found.append(rows_of(tokenizer, manifest))  # noqa: E731
    first = threading.Thread(target=call)
    first.start()
    assert begun.wait(20)
    waits(call, caplog, first.join)
    assert found == [30, 30] and len(builds) == 1


def test_without_locks_a_file_that_is_not_renewed_is_taken_over(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folders, "STALE_S", 0.4)
    monkeypatch.setattr(folders, "POLL_S", 0.02)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", unsupported)
    order, held = [], threading.Event()

    def work():
        with folders.locked(tmp_path):
            held.set()
            time.sleep(1.0)  # longer than stale: it is renewed
            order.append("first")

    thread = threading.Thread(target=work)
    thread.start()
    held.wait(10)
    with folders.locked(tmp_path):
        order.append("second")
    thread.join()
    assert order == ["first", "second"] and not (tmp_path / "writer").exists()
    (tmp_path / "writer").touch()
    with caplog.at_level(logging.INFO), folders.locked(tmp_path):
        assert "its writer has ended; going on" in caplog.text


@pytest.mark.parametrize("where", ["chunk", "columns", "plan"])
def test_a_full_disk_is_one_line_and_leaves_no_half_index(
    where, manifest, tokenizer, builds, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "chunk":
            patch.setattr("numpy.savez", full)
        else:
            what = opening if where == "columns" else folders
            name = "speechlm2_jax.data.index.prepare.survey" if where == "plan" else None
            patch.setattr(name, full) if name else patch.setattr(what, "write_columns", full)
        with pytest.raises(SettingsError, match="m.jsonl.index: no room for .*No space left"):
            rows_of(tokenizer, manifest)
    folder = manifest.with_name("m.jsonl.index")
    assert (folder / "rows").exists() == (where == "plan")
    assert not [path for path in folder.rglob(".*")]
    read = len(builds)
    assert rows_of(tokenizer, manifest) == 30
    # what was read is kept, where there was room for it
    assert len(builds) - read == (where == "chunk")


@pytest.mark.slow  # starts processes
def test_a_full_disk_in_a_process_of_its_own_is_told_too(manifest, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "ALONE_BYTES", 0)
    folder = manifest.with_name("m.jsonl.index")

    def removed(*args):
        tasks = [(folder / "gone" / "x.npz", 0, 10)]
        return list(build._done(args[1], tasks))

    monkeypatch.setattr(opening, "read_chunks", removed)
    with pytest.raises(OSError, match="No such file") as caught:
        rows_of(tokenizer, manifest)
    assert caught.value.errno == errno.ENOENT


def test_a_manifest_that_grows_while_it_is_read_is_refused_and_read_again(
    manifest, tokenizer, builds, monkeypatch
):
    monkeypatch.setattr(build, "CHUNK_BYTES", (1000, 1000))
    read = worker.ChunkReader.read

    def growing(self, start, end):
        if start == 0:
            row = json.loads(manifest.read_text().splitlines()[0])
            with open(manifest, "a") as file:
                file.write(json.dumps({**row, "id": "new"}) + "\n")
        return read(self, start, end)

    with monkeypatch.context() as patch:
        patch.setattr(worker.ChunkReader, "read", growing)
        with pytest.raises(SettingsError, match="m.jsonl: changed while it was read; start again"):
            rows_of(tokenizer, manifest)
    assert rows_of(tokenizer, manifest) == 31
    assert not list(manifest.with_name("m.jsonl.index").glob("building*"))
