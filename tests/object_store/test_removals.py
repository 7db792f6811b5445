"""Nothing that may be the only copy is removed, there or here, and no name leads elsewhere."""

import errno
import json
import os
import shutil

import pytest
import xxhash

from speechlm2_jax.object_store.commits import Commit
from speechlm2_jax.object_store.copies import fetch_run
from speechlm2_jax.object_store.downloads import fetch_file
from speechlm2_jax.object_store.mirror import Mirror
from speechlm2_jax.object_store.objects import ObjectStore, ObjectStoreError, path_below
from speechlm2_jax.training.run import store_lock
from speechlm2_jax.training.run.store_lock import StoreLock
from tests.object_store.tiny_run import Run, files, surroundings

__all__ = ["surroundings"]
pytestmark = pytest.mark.usefixtures("surroundings")
OUTSIDE = ("../x", "a/../../x", "/x", "a//x", "..", "", "a\\x", "./x", "a/\0")


def uploaded(*steps):
    """A run whose steps, rows and settings are in the store, and its mirror."""
    run = Run()
    for step in steps:
        run.step(step)
    run.write("metrics.jsonl", "{}"), run.write("config.yaml", "")
    mirror = run.mirror()
    mirror.push()
    return run, mirror


def record(name, below):
    text = json.dumps({"name": name, "files": {below: [1, xxhash.xxh3_128_hexdigest(b"x")]}})
    return f"{text}\n{xxhash.xxh3_128_hexdigest(text.encode())}\n".encode()


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_local_folder_that_vanishes_takes_nothing_from_the_store(is_made_again):
    run, mirror = uploaded("frozen", 3, 6)
    before = run.store.sizes()
    run.lose()
    if is_made_again:  # by the next checkpoint
        run.write("metrics.jsonl", "only new rows"), run.step(9)
    with pytest.raises(ObjectStoreError, match="was deleted, emptied or unmounted; nothing is"):
        mirror.push()
    assert before.items() <= run.store.sizes().items()
    assert run.committed() == ["frozen", "3", "6", *(["9"] if is_made_again else [])]
    assert mirror.left() >= 0


@pytest.mark.parametrize(
    ("inside", "kept"), [("checkpoints", ["3", "6"]), ("checkpoints/*", ["6"])]
)
def test_a_store_keeps_a_whole_step_even_if_no_local_one_is_left(inside, kept):
    run, mirror = uploaded(3, 6)
    for folder in list(run.folder.glob(inside)):
        shutil.rmtree(folder)
    mirror.push()
    assert run.committed() == kept
    assert any(name.startswith("checkpoints/6/") for name in run.store.sizes())


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(monkeypatch):
    run, mirror = uploaded(3)
    run.write("model/config.json", "{}")
    mirror.push()
    scandir = os.scandir

    def stale(path="."):
        if str(path).endswith("model"):
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        mirror.push()
    assert run.store.read("model/config.json") == b"{}" and mirror.left() == 0


@pytest.mark.parametrize("lost_after", range(4))
def test_a_process_that_lost_its_lock_leaves_the_store_as_it_is(lost_after, monkeypatch):
    run, _ = uploaded(3, 6)
    run.delete(3), run.step(9), run.delete(6), run.step(6, "another")
    (run.folder / "config.yaml").unlink()
    before, checks = dict(run.store._files.store), iter(range(100))

    def check():
        if next(checks) >= lost_after:
            raise ObjectStoreError("another process has taken over")

    removals, remove = [], run.store.remove
    monkeypatch.setattr(run.store, "remove", lambda names: (removals.append(names), remove(names)))
    with pytest.raises(ObjectStoreError, match="taken over"):
        Mirror(run.store, run.folder, run.commits, check).push()
    if lost_after == 0:
        assert dict(run.store._files.store) == before
    assert len(removals) <= max(lost_after - 1, 0)  # the first check is that of `push`


def test_a_lock_that_is_gone_or_damaged_is_told_apart_from_one_that_was_taken(monkeypatch):
    monkeypatch.setattr(store_lock, "HEARTBEAT_S", 60.0)
    run = Run()
    lock = StoreLock(run.store)
    lock.check()
    run.store.remove(["run.lock"])
    with pytest.raises(ObjectStoreError, match=r"runs/one/run\.lock is gone; it is written again"):
        lock.check()
    run.store.write("run.lock", b"{")
    with pytest.raises(ObjectStoreError, match=r"run\.lock cannot be read"):
        lock.check()
    lock.release()


def test_a_missing_last_writer_does_not_mean_overtaken(caplog):
    run, _ = uploaded(3)
    run.step(6), run.write("metrics.jsonl", "newer here"), run.write("config.0.yaml", "")
    run.store.remove(["last_writer"])
    before = files(run.folder)
    assert list(Run().commits) == ["3"] and files(run.folder) == before
    assert "another folder" not in caplog.text


def test_what_a_folder_without_its_token_has_alone_is_set_aside(caplog):
    run, _ = uploaded(3)
    run.step(6), run.write("config.0.yaml", "only here")
    (run.folder / ".last_writer").unlink()
    Run()
    assert not (run.folder / "checkpoints/6").exists()
    (aside,) = (run.folder.parent / "set_aside").iterdir()
    assert files(aside)["checkpoints/6/params/d/1"] == b"weights of 6"
    assert files(aside)["config.0.yaml"] == b"only here"
    assert f"is moved to {aside}; .last_writer is missing there" in caplog.text
    assert "another folder" not in caplog.text


@pytest.mark.parametrize("damage", [b"{}", b"", record("6", "../../x")])
def test_a_step_whose_record_cannot_be_read_stays_and_is_not_used(damage, caplog):
    run, _ = uploaded(3, 6)
    run.store.write("committed/6", damage)
    before = run.store.sizes("checkpoints")
    run.lose()
    assert list(Run().commits) == ["3"] and run.store.sizes("checkpoints") == before
    assert run.store.read("committed/6") == damage
    assert "runs/one/committed/6 cannot be read" in caplog.text and "left there" in caplog.text
    assert not (run.folder / "checkpoints/6").exists()


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_step_with_a_file_of_another_size_stays_and_an_intact_copy_replaces_it(is_lost, caplog):
    run, _ = uploaded(3, 6)
    run.store.write("checkpoints/6/params/d/1", b"short")
    run.store.write("last_writer", b"another")
    if is_lost:
        run.lose()
    again = Run()
    assert list(again.commits) == ["3"] and "6" in run.committed()
    assert "checkpoints/6/params/d/1 is missing or cut short" in caplog.text
    again.mirror().push()
    assert run.store.read("checkpoints/6/params/d/1") == (b"short" if is_lost else b"weights of 6")


def test_checkpoints_that_no_run_has_uploaded_are_not_removed():
    run = Run()
    run.store.remove(["last_writer"])
    run.store.write("checkpoints/3/params/d/1", b"copied by hand")
    with pytest.raises(ObjectStoreError, match="checkpoints/3 was not uploaded by a run there"):
        Run()
    assert run.store.read("checkpoints/3/params/d/1") == b"copied by hand"


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_a_folder_are_refused(name, tmp_path):
    with pytest.raises(ObjectStoreError, match="cannot be the name of an object of a run"):
        path_below(tmp_path, name)
    assert Commit.from_bytes(record("3", name)) is None
    assert Commit.from_bytes(record("3", "params/d/1..x")) is not None


@pytest.mark.parametrize("name", ["model/../../x", "model/a\\..\\x"])
def test_whoever_writes_to_a_bucket_writes_no_file_elsewhere(name, monkeypatch, tmp_path):
    run, _ = uploaded(3)
    sizes = run.store.sizes()
    monkeypatch.setattr(ObjectStore, "sizes", lambda *_: {**sizes, name: 1})
    with pytest.raises(ObjectStoreError, match="cannot be the name of an object of a run"):
        fetch_run(run.store.address)
    with pytest.raises(ObjectStoreError, match="cannot be the name of an object of a run"):
        fetch_file(run.store, name, tmp_path)


@pytest.mark.parametrize("name", ["../3", "3x", "٣", "03"])
def test_only_steps_and_frozen_have_records(name):
    run, _ = uploaded(3)
    run.store.write(f"committed/{name}", record(name, "x"))
    assert list(Run().commits) == ["3"]
