"""A store is kept equal to a run directory, and only whole checkpoints count."""

import shutil
import threading
import time

import pytest

from speechlm2_jax.checkpointing.ranking import Ranking, write_ranking
from speechlm2_jax.object_store import mirror as mirrors
from speechlm2_jax.object_store.copies import fetch_run
from speechlm2_jax.object_store.folders import address_of, copy_folder
from speechlm2_jax.object_store.objects import ObjectStore, ObjectStoreError
from speechlm2_jax.settings import SettingsError
from tests.object_store.tiny_run import ADDRESSES, Run, files, surroundings

__all__ = ["surroundings"]
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_empty_cache_gets_back_what_was_uploaded(address):
    run = Run(address)
    assert address_of(run.folder) == address
    run.step("frozen"), run.step(3), run.step(6)
    run.write("metrics.jsonl", '{"step": 6}\n')
    run.write("model/config.json", "{}")
    run.write(".draft", "x"), run.write("run.lock", "x"), run.write("a.draft", "x")
    run.mirror().push()
    assert run.committed() == ["frozen", "3", "6"]
    before = files(run.folder)
    for name in ("run.lock", "a.draft"):
        del before[name]
    run.lose()
    assert sorted(Run(address).commits) == ["3", "6", "frozen"]
    assert files(run.folder) == before


def test_a_step_without_its_record_does_not_count_and_is_removed(caplog):
    run = Run()
    run.step(3)
    run.mirror().push()
    run.step(6)
    store, write = run.store, run.store.write

    def killed(name, data):
        if name == "committed/6":
            raise KeyboardInterrupt
        write(name, data)

    store.write = killed
    with pytest.raises(KeyboardInterrupt):
        run.mirror().push()
    assert any(name.startswith("checkpoints/6/") for name in store.sizes())
    run.lose()
    resumed = Run()
    assert list(resumed.commits) == ["3"]
    assert not any(name.startswith("checkpoints/6/") for name in store.sizes())
    assert "memory://bucket/runs/one: step 6 was not uploaded whole and is removed" in caplog.text


def test_what_a_killed_process_had_not_uploaded_is_uploaded_by_the_next_one_there():
    run = Run()
    run.step(3)
    run.mirror().push()
    run.step(6), run.write("metrics.jsonl", "newer here")
    again = Run()
    assert files(again.folder)["metrics.jsonl"] == b"newer here"
    again.mirror().push()
    assert run.committed() == ["3", "6"]


def test_a_folder_that_others_have_overtaken_becomes_what_the_store_holds(monkeypatch, caplog):
    here = Run()
    here.step(3), here.write("metrics.jsonl", "old"), here.write("config.0.yaml", "old")
    here.mirror().push()
    here.step(9, "never uploaded")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SPEECHLM2_JAX_RUN_CACHE", str(here.folder.parents[2] / "elsewhere"))
        there = Run()
        (
            there.step(6),
            there.write("metrics.jsonl", "new"),
            (there.folder / "config.0.yaml").unlink(),
        )
        there.delete(3), there.step(3, "another")
        there.mirror().push()
        expected = files(there.folder)
    Run()
    assert files(here.folder) == expected
    assert "step 9 of " in caplog.text and "the store does not hold it" in caplog.text


def test_deleted_steps_leave_the_store_once_newer_ones_are_there():
    run = Run()
    mirror = run.mirror()
    run.step(3), mirror.push()
    run.delete(3), run.step(6)
    upload, seen = run.store.upload, []

    def watched(name, *arguments):
        seen.append(run.committed())
        upload(name, *arguments)

    run.store.upload = watched
    mirror.push()
    assert seen and all("3" in names for names in seen)  # never without a whole checkpoint
    assert run.committed() == ["6"]
    assert {name.split("/")[1] for name in run.store.sizes("checkpoints")} == {"6"}
    run.write("FINISHED", "{}"), mirror.push()
    (run.folder / "FINISHED").unlink(), mirror.push()
    assert run.store.read("FINISHED") is None


def test_a_step_that_is_written_again_is_uploaded_again():
    run = Run()
    run.step(3, "first"), run.mirror().push()
    run.delete(3), run.step(3, "second")
    Run().mirror().push()
    assert run.store.read("checkpoints/3/params/d/1") == b"second of 3"
    run.lose()
    assert (Run().folder / "checkpoints/3/params/d/1").read_text() == "second of 3"


def test_the_end_of_a_run_is_told_last():
    run = Run()
    run.step(3), run.write("FINISHED", "{}")
    upload, seen = run.store.upload, []

    def watched(*arguments):
        seen.append(run.store.read("FINISHED"))
        upload(*arguments)

    run.store.upload = watched
    run.mirror().push()
    assert seen and not any(seen) and run.store.read("FINISHED") == b"{}"


def test_a_step_that_is_deleted_while_it_is_uploaded_is_still_whole():
    run = Run()
    run.step(3)
    upload = run.store.upload

    def deleting(*arguments):
        shutil.rmtree(run.folder / "checkpoints" / "3", ignore_errors=True)
        upload(*arguments)

    run.store.upload = deleting
    mirror = run.mirror()
    mirror._push_step("3")
    assert run.committed() == ["3"] and mirror.last_step == 3


def test_a_damaged_step_is_named_and_not_uploaded(caplog):
    run = Run()
    (run.step(3) / "params/d/1").unlink()
    run.mirror().push()
    assert run.committed() == [] and "params/d/1" in caplog.text


def test_damage_in_the_store_is_found(caplog):
    run = Run()
    run.step(3), run.step(6), run.step(9), run.mirror().push()
    run.store.write("checkpoints/9/params/d/1", b"weighty of 9")
    run.store.remove(["checkpoints/6/opt/2"])
    run.lose()
    assert list(Run().commits) == ["3"]
    assert "checkpoints/9/params/d/1 has changed since it was written" in caplog.text
    assert "checkpoints/6/opt/2 is missing or cut short" in caplog.text


def test_a_training_continues_through_failures_and_its_end_waits(caplog):
    run = Run()
    upload, fails = run.store._files.pipe_file, threading.Event()

    def flaky(*arguments, **options):
        if fails.is_set():
            raise ConnectionError("no route to host")
        upload(*arguments, **options)

    run.store._files.pipe_file = flaky
    try:
        fails.set()
        mirror = run.mirror()
        mirror.start()
        run.step(3), run.write("metrics.jsonl", "{}")
        while "trying again" not in caplog.text:
            time.sleep(0.01)
        assert "cannot upload to memory://bucket/runs/one (memory" in caplog.text
        assert "ConnectionError: no route to host" in caplog.text and run.committed() == []
        threading.Timer(0.2, fails.clear).start()
        assert mirrors.wait_with_progress(mirror, "there", lambda is_over: is_over)
        assert run.committed() == ["3"] and mirror.left() == 0
        assert run.store.read("metrics.jsonl") == b"{}"
    finally:
        del run.store._files.pipe_file


def test_an_upload_that_stands_still_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr(mirrors, "PATIENCE_S", 0.2)
    run = Run()
    run.step(3)
    monkeypatch.setattr(run.store, "upload", lambda *_: None)
    mirror = run.mirror()
    mirror.start()
    while "trying again" not in caplog.text:
        time.sleep(0.01)
    assert not mirrors.wait_with_progress(mirror, "there", lambda is_over: is_over)
    assert "is not there as it was uploaded" in mirror.problem and run.committed() == []


def test_readers_get_the_best_step_or_the_one_that_they_name(caplog):
    run = Run()
    run.step("frozen"), run.step(3), run.step(6), run.step(9)
    metrics = {step: {"val_loss": loss} for step, loss in ((3, 2.0), (6, 1.0), (9, 3.0))}
    write_ranking(run.folder / "checkpoints", Ranking(metrics=metrics))
    run.write("config.yaml", "a: 1"), run.write("model/config.json", "{}")
    run.write("train.log", "long")
    run.mirror().push()
    address = run.store.address
    folder = fetch_run(address)
    assert folder == copy_folder(address) and sorted(files(folder)) == sorted(
        {name for name in files(run.folder) if not name.startswith(("checkpoints/3", "train"))}
        - {name for name in files(run.folder) if name.startswith("checkpoints/9")}
    )
    assert (fetch_run(address, "last") / "checkpoints/9/params/d/1").is_file()
    assert fetch_run(f"{address}/checkpoints/3/") == folder / "checkpoints" / "3"
    run.store.write("checkpoints/6/params/d/1", b"weighty of 6")
    shutil.rmtree(folder)
    assert [path.name for path in (fetch_run(address) / "checkpoints").iterdir() if path.is_dir()]
    assert (folder / "checkpoints/3").is_dir() and not (folder / "checkpoints/6").exists()
    assert "checkpoints/6/params/d/1 has changed" in caplog.text
    with pytest.raises(ObjectStoreError, match="found no step 4 .steps that are whole: 9, 6, 3"):
        fetch_run(f"{address}/checkpoints/4")
    with pytest.raises(ObjectStoreError, match="found no checkpoint of a run .*: none"):
        fetch_run("memory://bucket/nothing")


def test_addresses_that_cannot_hold_a_run_are_refused(monkeypatch):
    with pytest.raises(SettingsError, match="a run directory cannot be at https://"):
        ObjectStore("https://host/run")
    with pytest.raises(SettingsError, match="ftp:// is not supported"):
        ObjectStore("ftp://host/run")
    monkeypatch.undo()
    with pytest.raises(SettingsError, match="needs the package gcsfs; python -m pip install gcsfs"):
        ObjectStore("gs://bucket/run")
