"""Processes that differ in settings, code, data or run directory are refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from speechlm2_jax import processes
from speechlm2_jax.launch import COORDINATOR, COUNT, INDEX
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run import hosts
from tests.training.tiny_salm import write_config
from tests.training.toy import ToyData

ROOT = Path(__file__).parents[2]


def found(*facts):
    return [{"host": f"host{i}", "facts": own} for i, own in enumerate(facts)]


def test_what_differs_is_named_with_the_process_that_differs():
    same = {"data.train_ds.batch_size": "4", "jax": "0.11.0"}
    other = {"data.train_ds.batch_size": "8", "jax": "0.11.0"}
    text = hosts.differences(found(same, same, other))
    assert text.startswith(
        "the processes of this run differ in data.train_ds.batch_size: 4 on 2 of 3 processes, "
        "8 on process 2 (host2). Start"
    )
    missing = hosts.differences(found(same, {"jax": "0.11.0"}))
    assert "batch_size: 4 on 1 of 2 processes, not set on process 1 (host1)" in missing


def test_many_differences_are_counted_not_listed():
    sets = [{f"k{n}": str(i if n < 5 else 0) for n in range(7)} for i in range(6)]
    text = hosts.differences(found(*sets))
    assert text.count(" on 1 of 6 processes") == 3 and "; and 2 more. Start" in text
    assert "1 on process 1 (host1)" in text and "and 2 more processes" in text
    assert "k5" not in text and "k6" not in text


def test_names_and_local_folders_may_differ():
    def settings(name, batch):
        return {
            "exp_manager": {"explicit_log_dir": name, "wandb_logger_kwargs": {"name": name}},
            "trainer": {"compilation_cache_dir": f"/local/{name}"},
            "data": {"train_ds": {"bins": [1, batch], "empty": {}}},
        }

    one = hosts.setting_facts(settings("a", 2))
    assert one == hosts.setting_facts(settings("b", 2))
    assert one == {
        "data.train_ds.bins.0": "1",
        "data.train_ds.bins.1": "2",
        "data.train_ds.empty": "{}",
    }
    assert one != hosts.setting_facts(settings("a", 3))


def test_the_code_is_known_by_its_files(tmp_path, monkeypatch):
    code = hosts.code_facts()
    assert code["jax"] == jax.__version__
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(hosts.speechlm2_jax, "__file__", str(tmp_path / "__init__.py"))
    one = hosts.code_facts.__wrapped__()
    (tmp_path / "__init__.py").write_text("# edited on this host alone\n")
    two = hosts.code_facts.__wrapped__()
    changed = {name for name in two if one[name] != two[name]}
    assert changed == {"code of speechlm2_jax"} and one != code


def test_a_run_directory_that_another_process_does_not_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "SEEN_S", 0.0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "broadcast_text", lambda _: ".shared_1")
    monkeypatch.setattr(processes, "barrier", lambda _: None)
    monkeypatch.setattr(processes, "gather_texts", lambda own: ["yes", own])
    (tmp_path / ".shared_1").write_text("by process 0")
    hosts.check_shared(tmp_path)
    (tmp_path / ".shared_1").unlink()
    with pytest.raises(SettingsError) as raised:
        hosts.check_shared(tmp_path)
    told = str(raised.value)
    assert told.startswith(f"the run directory {tmp_path} is not shared: process 1 on ")
    assert "(1 of 2 processes do not)" in told and "exp_manager.explicit_log_dir" in told


def test_an_error_of_one_process_is_raised_on_all(monkeypatch):
    problems = ["", "disk of host1 is full"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gather_texts", lambda own: [own, problems[1]])
    with pytest.raises(SettingsError, match="disk of host1 is full"):
        hosts.together(lambda: None)
    problems[1] = ""
    hosts.together(lambda: None)


def test_empty_texts_are_not_sent(monkeypatch):
    sent = []

    def gather(array):
        sent.append(array)
        return np.stack([array, array])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    assert processes.gather_texts("") == ["", ""] and all(array.size for array in sent)
    assert processes.gather_texts("aä") == ["aä", "aä"] and sent[-1].size == 3


def test_the_data_of_training_and_validation_is_compared(monkeypatch):
    class Data(ToyData):
        def fingerprints(self):
            return {"validation_ds.clean": "12ab"}

    gathered = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "check_same", gathered.append)
    data = Data(groups=1)
    batches = data.train_batches(None)
    monkeypatch.setattr(batches, "get_state", lambda: {"data": 7, "contents": "ff", "next": 3})
    hosts.check_data(data, batches)
    monkeypatch.setattr(batches, "get_state", lambda: {"data": 7, "contents": "fe", "next": 3})
    hosts.check_data(data, batches)
    one, two = gathered
    assert one["data of validation_ds.clean"] == "12ab"
    assert {name for name in one if one[name] != two[name]} == {"training data"}


def start(folders, config, *overrides):
    """Two processes of train.py, each in its own working folder; overrides of the second."""
    running = []
    for index, folder in enumerate(folders):
        own = {COORDINATOR: "127.0.0.1:47131", COUNT: "2", INDEX: str(index)}
        words = ["exp_manager.explicit_log_dir=run", *(overrides if index else ())]
        running.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), "--config", str(config), *words],
                cwd=folder,
                env={**os.environ, **own, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, err) for process, (_, err) in zip(running, ended, strict=True)]


@pytest.mark.slow  # two pairs of processes, each of which imports
def test_real_processes_are_refused_before_the_first_step(tmp_path):
    config = write_config(tmp_path, trainer={"max_steps": 2, "devices": -1})
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    for code, err in start(folders, config):
        assert code == 2, err
        assert "the run directory run is not shared: process 1 on " in err
    for code, err in start([tmp_path, tmp_path], config, "model.optimizer.lr=0.5"):
        assert code == 2, err
        assert "differ in model.optimizer.lr: " in err and "0.5 on process 1" in err
    assert not list(tmp_path.rglob("metrics.jsonl"))
