"""Runs at addresses: they resume from an empty cache, bit for bit, and one process trains there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import jax
import pytest

from speechlm2_jax import processes
from speechlm2_jax.checkpointing import load_weights
from speechlm2_jax.object_store import mirror as mirrors
from speechlm2_jax.object_store import objects
from speechlm2_jax.object_store.copies import fetch_run
from speechlm2_jax.object_store.folders import CACHE_VARIABLE, shown
from speechlm2_jax.object_store.objects import ObjectStore, ObjectStoreError
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.exp_manager import ExpManagerConfig
from speechlm2_jax.training.run import hosts, store_lock
from speechlm2_jax.training.run.opening import UploadError
from speechlm2_jax.training.run.run_lock import Owner
from tests.object_store.emulated import environment, use_stores
from tests.training.tiny_salm import write_config
from tests.training.toy import ToyData, ToyModel, make_trainer, rows_of

ROOT = Path(__file__).parents[2]
ADDRESS = "memory://bucket/runs/one"
COMPARED = ("step", "loss", "learning_rate", "grad_norm", "acc", "skipped", "dropped")
RESUMED = {
    "resume_if_exists": True,
    "resume_ignore_no_checkpoint": True,
    "create_tensorboard_logger": False,
}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "PAUSES_S", ())
    monkeypatch.setattr(mirrors, "LOOK_S", 0.05)
    yield
    fsspec.filesystem("memory").store.clear()


def fit(place, steps, **options):
    trainer = make_trainer(place, max_steps=steps, **options)
    return trainer, trainer.fit(ToyModel(dropout=0.2), ToyData())


def compared(run_dir):
    training, validation = rows_of(run_dir)
    return [{k: row[k] for k in COMPARED} for row in training.values()], validation


@pytest.mark.parametrize(
    "address",
    [ADDRESS, pytest.param("s3://bucket/runs/one", marks=pytest.mark.slow)],  # the same way
)
def test_a_run_resumes_from_an_empty_cache_bit_for_bit(tmp_path, monkeypatch, capsys, address):
    use_stores(tmp_path / "stores", monkeypatch)
    fit(tmp_path / "whole", 6)
    stopped = {"max_time_per_run": "00:00:00:00"}
    trainer, result = fit(address, 6, experiment=stopped)
    store = ObjectStore(address)
    assert not result.is_finished and store.read("FINISHED") is None
    assert store.read("run.lock") is None and "committed/1" in store.sizes()
    shutil.rmtree(tmp_path / "cache")

    trainer, result = fit(address, 6)
    assert compared(trainer.run_dir) == compared(tmp_path / "whole")
    assert json.loads(store.read("FINISHED"))["step"] == result.step == 6
    out = capsys.readouterr().out
    assert f"the run is whole at {address}" in out
    assert f" pretrained_name={address}  |  " in out
    for name in ("config.yaml", "command.txt", "environment.txt", "train.log"):
        assert store.read(name)
    assert store.read("metrics.jsonl") == (trainer.run_dir / "metrics.jsonl").read_bytes()

    shutil.rmtree(tmp_path / "cache")
    weights = [load_weights(run).variables for run in (fetch_run(address), tmp_path / "whole")]
    assert all((weights[0][name] == value).all() for name, value in weights[1].items())
    finished = make_trainer(max_steps=6).finished({**RESUMED, "explicit_log_dir": address})
    assert finished.step == 6 and finished.metrics["val_loss"] == result.metrics["val_loss"]
    assert make_trainer(max_steps=7).finished({**RESUMED, "explicit_log_dir": address}) is None

    other = {"resume_from_checkpoint": address, "resume_if_exists": False}
    _, result = fit(tmp_path / "next", 8, experiment=other)
    assert result.step == 8 and f"{shown(fetch_run(address))}" == address


def test_a_second_training_at_an_address_is_refused_until_the_first_one_is_silent(
    monkeypatch, caplog
):
    monkeypatch.setattr(store_lock, "SILENT_S", 0.3)
    store = ObjectStore(ADDRESS)
    here = Owner.this_process()
    there = replace(here, token="1", host="elsewhere")
    renewals, is_over = iter(range(10**6)), threading.Event()

    def lock(owner):
        store.write("run.lock", json.dumps({**asdict(owner), "beats": next(renewals)}).encode())

    def renew():
        while not is_over.wait(0.02):
            lock(there)

    lock(there)
    renewing = threading.Thread(target=renew)
    renewing.start()
    with pytest.raises(SettingsError, match="memory://.* is in use by .* on elsewhere, since"):
        make_trainer(ADDRESS)
    is_over.set()
    renewing.join()
    lock(here)
    with pytest.raises(SettingsError, match="is in use by another training"):
        make_trainer(ADDRESS)
    lock(there)
    trainer = make_trainer(ADDRESS)  # nobody renews it
    assert "taking over memory://bucket/runs/one" in caplog.text and "silent" in caplog.text
    assert sorted(store.sizes()) == ["last_writer", "run.lock"]
    lock(there)
    with pytest.raises(ObjectStoreError, match="another process has taken over"):
        trainer._opened._store.lock.check()
    store.remove(["run.lock"])
    trainer._opened.release()
    lock(replace(here, process_start="0"))  # was killed
    make_trainer(ADDRESS)._opened.release()
    assert list(store.sizes()) == ["last_writer"]


def test_a_run_whose_end_cannot_be_uploaded_fails_and_names_the_local_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(mirrors, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(mirrors, "PATIENCE_S", 0.3)
    make_trainer(ADDRESS)  # trainers of one process share the lock
    trainer = make_trainer(ADDRESS, max_steps=1)
    files = fsspec.filesystem("memory")

    def refuses(*_, **__):
        raise PermissionError("403: storage.objects.create")

    with monkeypatch.context() as refusing:
        refusing.setattr(files, "put_file", refuses, raising=False)
        with pytest.raises(UploadError) as raised:
            trainer.fit(ToyModel(dropout=0.2), ToyData())
    told = str(raised.value).splitlines()
    assert told[0].startswith(
        f"{ADDRESS} does not hold the end of this run: {ADDRESS}: not allowed"
    )
    assert told[1].strip() == "its last complete checkpoint: none"
    assert str(trainer.run_dir) in told[2]
    store = ObjectStore(ADDRESS)
    assert store.read("run.lock") is None and store.read("FINISHED") is None

    _, result = fit(ADDRESS, 1)
    assert result.is_finished and {"FINISHED", "committed/1"} <= store.sizes().keys()


def test_run_directories_are_named_as_paths_are(tmp_path):
    files = fsspec.filesystem("memory")
    files.pipe_file("/b/exp/name/version_0/config.yaml", b"")

    def named(**options):
        return shown(ExpManagerConfig(exp_dir="memory://b/exp/", name="name", **options).run_dir())

    assert named(version="a") == "memory://b/exp/name/a"
    assert named(resume_if_exists=True) == "memory://b/exp/name"
    assert named().startswith("memory://b/exp/name/2")
    assert named(use_datetime_version=False) == "memory://b/exp/name/version_1"
    assert ExpManagerConfig(explicit_log_dir=f"file://{tmp_path}").run_dir() == tmp_path
    assert shown(make_trainer(default_root_dir="memory://b/c").run_dir) == "memory://b/c"
    refused = {"resume_if_exists": False}
    fit("memory://b/c", 1)
    with pytest.raises(SettingsError, match="memory://b/c holds checkpoints of a run"):
        make_trainer("memory://b/c", experiment=refused)
    assert ObjectStore("memory://b/c").read("run.lock") is None


def test_processes_that_do_not_share_the_local_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "SEEN_S", 0.0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "broadcast_text", lambda text: text or ".shared_1")
    monkeypatch.setattr(processes, "barrier", lambda _: None)
    monkeypatch.setattr(
        processes, "gather_texts", lambda own: ["", own] if not own else ["yes", own]
    )
    with pytest.raises(SettingsError) as raised:
        make_trainer(ADDRESS)
    told = str(raised.value)
    assert " is not shared: process 1 on " in told and f"a run at {ADDRESS} works there" in told
    assert "set SPEECHLM2_JAX_RUN_CACHE to a folder of a file system that all hosts mount" in told


@pytest.mark.slow  # four processes
def test_processes_that_share_the_local_folder_are_one_run(tmp_path):
    address, steps = "gs://bucket/one", "9"
    own = {
        **environment(tmp_path / "stores"),
        "JAX_PLATFORMS": "cpu",
        "TOY_CACHE": str(tmp_path / "compiled"),
    }

    def start(place, cache):
        launch = ["-m", "speechlm2_jax.launch", "-n", "2", "tests/training/toy_processes.py"]
        done = subprocess.run(
            [sys.executable, *launch, place, steps],
            cwd=ROOT,
            env={**os.environ, **own, CACHE_VARIABLE: str(tmp_path / cache)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = start(address, "cache")
    store = tmp_path / "stores" / "gs" / "bucket" / "one"
    assert out.count(f"the run is whole at {address}") == 1
    assert json.loads((store / "FINISHED").read_text())["step"] == 9
    assert (store / "committed" / "9").is_file() and not (store / "run.lock").exists()
    start(str(tmp_path / "whole"), "cache")
    assert compared(store) == compared(tmp_path / "whole")
    again = start(address, "empty")
    assert "resuming from" in again and again.count(f"the run is whole at {address}") == 1


class Train:
    """train.py and evaluate.py in processes that share compiled programs and stores."""

    STEPS = 40

    def __init__(self, folder):
        self.folder, self.store = folder, folder / "stores" / "gs" / "bucket" / "one"
        saved = {"every_n_train_steps": 5, "save_top_k": 1}
        self.config = write_config(
            folder,
            trainer={
                "max_steps": self.STEPS,
                "limit_train_batches": 20,
                "log_every_n_steps": 1,
                "precision": "32-true",
            },
            exp_manager={"checkpoint_callback_params": saved},
            seconds={"short": 0.5, "long": 0.5},  # one program
        )

    def start(self, place, *, pause_s=0.0, cache="cache", program="train.py", words=()):
        own = {
            **environment(self.folder / "stores", pause_s),
            CACHE_VARIABLE: str(self.folder / cache),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PLATFORMS": "cpu",
        }
        run = ["--config", str(self.config), f"exp_manager.explicit_log_dir={place}"]
        return subprocess.Popen(
            [sys.executable, program, *(words or run)],
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments, **options):
        process = self.start(*arguments, **options)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
        return out

    def rows(self, run_dir):
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        training = [{k: row[k] for k in COMPARED} for row in rows if "loss" in row]
        return training, [row for row in rows if "val_loss" in row]

    def names(self, inside):
        """What has objects: the emulated store leaves empty folders behind."""
        found = (
            path.relative_to(self.store / inside) for path in self.store.glob(f"{inside}/**/*")
        )
        return {path.parts[0] for path in found if (self.store / inside / path).is_file()}

    def steps(self):
        """The steps that are there in part, and those that are whole."""
        whole = {name for name in self.names("committed") if name.isdigit()}
        there = {name for name in self.names("checkpoints") if name.isdigit()}
        return there - whole, whole

    def kill_during_an_upload(self, process, committed):
        """Kills it when a step is there in part and others are whole; gives `steps`."""
        reader = threading.Thread(target=process.communicate)  # a pipe is short
        reader.start()
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            partial, whole = self.steps()
            if partial and len(whole) >= committed:
                os.kill(process.pid, signal.SIGKILL)
                reader.join()
                return self.steps()
            time.sleep(0.02)
        raise AssertionError("no upload was seen")


@pytest.mark.slow  # five processes, each of which imports
def test_a_run_killed_during_an_upload_ends_as_an_undisturbed_one(tmp_path):
    train, address = Train(tmp_path), "gs://bucket/one"
    train.run(tmp_path / "whole")
    partial, whole = train.kill_during_an_upload(train.start(address, pause_s=0.4), 1)
    assert partial and not (train.store / "FINISHED").exists()
    assert (train.store / "run.lock").is_file()

    out = train.run(address, cache="empty")
    last = max(whole, key=int)
    for step in partial:
        assert f"{address}: step {step} was not uploaded whole and is removed" in out
    assert f"taking over {address}: process " in out and "(is gone)" in out
    assert f"/run/checkpoints/{last}\n" in out and "resuming from" in out
    assert f"the run is whole at {address}" in out
    assert json.loads((train.store / "FINISHED").read_text())["step"] == train.STEPS
    assert train.rows(train.store) == train.rows(tmp_path / "whole")
    assert len(train.rows(train.store)[0]) == train.STEPS
    assert not (train.store / "run.lock").exists()
    assert f"finished {train.STEPS} steps" in (train.store / "train.log").read_text()
    kept = {path.name for path in (tmp_path / "whole" / "checkpoints").iterdir() if path.is_dir()}
    assert train.names("committed") == train.names("checkpoints") - {"ranking.json"} == kept
    ours, other = (load_weights(run, "last") for run in (train.store, tmp_path / "whole"))
    assert ours.step == other.step == train.STEPS
    assert all((ours.variables[name] == value).all() for name, value in other.variables.items())

    out = train.run(address, cache="third")
    assert f"this run is finished: {train.STEPS} steps are done" in out and "resuming" not in out
    words = [f"pretrained_name={address}", f"inputs={tmp_path / 'train.jsonl'}", "max_new_tokens=4"]
    out = train.run(address, cache="third", program="evaluate.py", words=words)
    assert f"{address}, step " in out
