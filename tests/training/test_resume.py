"""Stopping and going on: bit for bit the run that was never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from speechlm2_jax.checkpointing import load_weights, read_item, step_folders
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.stopping import SIGNALS
from tests.training.toy import ToyData, ToyModel, make_trainer, rows_of

TOY = Path(__file__).parent / "toy.py"
COMPARED = ("step", "loss", "learning_rate", "grad_norm", "acc", "skipped")


def fit(run_dir, max_steps=7, data=None, model=None, **options):
    trainer = make_trainer(run_dir, max_steps=max_steps, **options)
    return trainer.fit(model or ToyModel(dropout=0.2), data or ToyData())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    fit(run_dir)
    return run_dir


def compared(run_dir):
    training, validation = rows_of(run_dir)
    return [{k: row[k] for k in COMPARED} for row in training.values()], validation


def assert_same_run(one, other):
    """Losses, validation, weights, optimizer and data state, bit for bit."""
    assert compared(one) == compared(other)
    a, b = (load_weights(run, "last") for run in (one, other))
    assert a.step == b.step
    for path in a.variables:
        np.testing.assert_array_equal(a.variables[path], b.variables[path])
    first, second = (read_item(step_folders(run)[0], "progress") for run in (one, other))
    assert first == second
    assert load_weights(one).step == load_weights(other).step  # the same is best


@pytest.mark.parametrize("stop", [2, 3])
def test_stop_at_step_k_and_resume_equals_never_stopping(uninterrupted, tmp_path, stop):
    first = fit(tmp_path, data=ToyData(), experiment={"max_time_per_run": None}, max_steps=stop)
    assert first.step == stop
    drop_validation_of_the_end(tmp_path, stop)
    assert fit(tmp_path).step == 7
    assert_same_run(uninterrupted, tmp_path)


def drop_validation_of_the_end(run_dir, stop):
    """A run planned to end at `stop` also validates there, which a longer one may not."""
    if stop % 3:
        path = run_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row for row in rows if not ("val_loss" in row and row["step"] == stop)]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        ranking = run_dir / "checkpoints" / "ranking.json"
        stored = json.loads(ranking.read_text())
        del stored["metrics"][str(stop)]
        ranking.write_text(json.dumps(stored))


def run_process(run_dir, **arguments):
    environment = {**os.environ, "PYTHONPATH": str(TOY.parents[2]), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(TOY), str(run_dir), json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("sent", "name"), [("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")])
def test_a_signal_saves_and_resumes_exactly(uninterrupted, tmp_path, sent, name):
    signal_at = 3  # a validation is due there, and left for the process that goes on
    done = run_process(tmp_path, max_steps=7, signal_at=signal_at - 1, signals=[sent])
    assert done.returncode == 0, done.stderr
    assert (
        f"{name}: stopping after this step, then saving; press Ctrl-C again to exit" in done.stdout
    )
    assert f"stopped at step {signal_at}: {name} was received" in done.stdout
    assert [int(p.name) for p in step_folders(tmp_path)] == [signal_at]
    assert fit(tmp_path).is_finished
    assert_same_run(uninterrupted, tmp_path)


def test_a_second_ctrl_c_leaves_at_once_and_costs_what_was_not_saved(uninterrupted, tmp_path):
    signals = ["SIGINT", "SIGINT"]
    saved = str(tmp_path / "checkpoints" / "3")
    done = run_process(tmp_path, max_steps=7, signal_at=5, signals=signals, after=saved)
    assert done.returncode == 130
    assert "exited at once" in done.stderr
    assert [int(p.name) for p in step_folders(tmp_path)] == [3]
    assert fit(tmp_path).is_finished
    assert_same_run(uninterrupted, tmp_path)


def test_signal_handlers_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    fit(tmp_path, max_steps=1)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_before_the_first_step_stops_without_a_checkpoint(tmp_path):
    class Signalling(ToyData):
        def setup(self, **options):
            super().setup(**options)
            os.kill(os.getpid(), signal.SIGINT)

    result = fit(tmp_path, data=Signalling())
    assert result.step == 0 and "Ctrl-C was received" in result.reason
    assert not step_folders(tmp_path)


def test_skipped_steps_are_remembered(tmp_path):
    bad = {1: np.nan, 4: np.nan}
    fit(tmp_path / "whole", data=ToyData(bad=bad))
    fit(tmp_path / "parts", data=ToyData(bad=bad), max_steps=3)
    fit(tmp_path / "parts", data=ToyData(bad=bad))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert rows_of(tmp_path / "parts")[0][7]["skipped"] == 2


def test_accumulation_resumes_between_steps(tmp_path):
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_steps": 4}
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "parts", **{**options, "max_steps": 2})
    fit(tmp_path / "parts", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_rows_after_the_checkpoint_are_taken_back(tmp_path, uninterrupted):
    fit(tmp_path, max_steps=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9.9}\n{"step": 5, "lo')
    fit(tmp_path)
    assert compared(tmp_path) == compared(uninterrupted)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_newest_checkpoint_costs_steps_not_the_run(uninterrupted, tmp_path, capsys):
    every = {"checkpoint_callback_params": {"save_top_k": -1}}
    fit(tmp_path, max_steps=6, experiment=every)
    shutil.rmtree(tmp_path / "checkpoints" / "6" / "params")
    fit(tmp_path)
    output = capsys.readouterr().out
    assert "cannot read checkpoint" in output and "resuming from" in output
    assert (tmp_path / "checkpoints" / "unreadable_6").is_dir()
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize("part", ["6", "frozen"])
def test_a_flipped_bit_changes_nothing_but_the_names(uninterrupted, tmp_path, capsys, part):
    fit(tmp_path, max_steps=6)
    checkpoints = tmp_path / "checkpoints"
    files = [path for path in (checkpoints / part).rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    fit(tmp_path)
    output = capsys.readouterr().out
    assert output.count(f"{file} has changed since it was written") == 1
    assert (checkpoints / f"unreadable_{part}").is_dir() and (checkpoints / part).is_dir()
    assert_same_run(uninterrupted, tmp_path)


def test_another_mesh_goes_on_with_the_same_global_batches(tmp_path):
    strategies = {
        "data": {"devices": 8},
        "mixed": {
            "devices": 8,
            "strategy": {
                "_target_": "lightning.pytorch.strategies.ModelParallelStrategy",
                "data_parallel_size": 4,
                "tensor_parallel_size": 2,
                "fsdp_size": 2,
            },
        },
        "one": {"devices": 1},
    }
    one_bucket = {"data": ToyData(lengths=(5,)), "limit_val_batches": 0}
    fit(tmp_path / "whole", max_steps=6, **one_bucket, **strategies["data"])
    fit(tmp_path / "parts", max_steps=2, **one_bucket, **strategies["data"])
    fit(tmp_path / "parts", max_steps=4, **one_bucket, **strategies["mixed"])
    model = ToyModel(dropout=0.2)
    fit(tmp_path / "parts", max_steps=6, model=model, **one_bucket, **strategies["one"])
    whole, parts = rows_of(tmp_path / "whole")[0], rows_of(tmp_path / "parts")[0]
    losses = [[row["loss"] for row in rows.values()] for rows in (whole, parts)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    np.testing.assert_allclose(
        load_weights(tmp_path / "whole", "last").variables["layers.weight"],
        jax.device_get(model.variables["layers.weight"]),
        atol=1e-5,
    )


def test_a_mesh_that_cannot_share_the_groups_is_refused_with_those_that_can(tmp_path):
    fit(tmp_path, max_steps=1, devices=4, limit_val_batches=0)
    with pytest.raises(SettingsError, match="data-parallel size of 1, 2, 4"):
        fit(tmp_path, max_steps=2, devices=8)


def test_another_choice_of_frozen_parameters_is_refused_by_name(tmp_path):
    fit(tmp_path, max_steps=1)
    model = ToyModel(dropout=0.2)
    model.trainable = {**model.trainable, "embedding.weight": True}
    with pytest.raises(ValueError, match="embedding.weight is not in the checkpoint"):
        fit(tmp_path, max_steps=2, model=model)


def test_resume_from_checkpoint_starts_a_new_run_where_another_stopped(tmp_path, uninterrupted):
    fit(tmp_path / "first", max_steps=3)
    other = {"resume_from_checkpoint": str(tmp_path / "first")}
    assert fit(tmp_path / "second", experiment=other).step == 7
    a, b = (load_weights(run, "last") for run in (uninterrupted, tmp_path / "second"))
    for path in a.variables:
        np.testing.assert_array_equal(a.variables[path], b.variables[path])
    assert list(rows_of(tmp_path / "second")[0]) == [4, 5, 6, 7]


def test_resume_from_a_place_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="found no checkpoint of a run"):
        make_trainer(tmp_path / "run", experiment={"resume_from_checkpoint": str(tmp_path)})
