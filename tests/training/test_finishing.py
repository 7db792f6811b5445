"""The end of a run: the lines that say what to type next, and runs that are over."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from speechlm2_jax.checkpointing.checksums import read_checksums, write_checksums
from speechlm2_jax.checkpointing.folders import RANKED
from speechlm2_jax.exit_codes import FINISHED, UNFINISHED
from speechlm2_jax.object_store.folders import CACHE_VARIABLE, working_folder
from speechlm2_jax.training.intervals import Intervals
from speechlm2_jax.training.run.directory import checkpoints_line, curves_line, next_line
from speechlm2_jax.training.run.finishing import exit_code
from tests.training.toy import ToyData, ToyModel, make_trainer, rows_of

EXPERIMENT = {
    "resume_if_exists": True,
    "resume_ignore_no_checkpoint": True,
    "create_tensorboard_logger": False,
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finishing") / "run"
    make_trainer(run_dir, max_steps=4).fit(ToyModel(dropout=0.2), ToyData())
    return run_dir


def finished(run_dir, **options):
    trainer = make_trainer(max_steps=4, **options)
    return trainer.finished({**EXPERIMENT, "explicit_log_dir": str(run_dir)})


def test_a_finished_run_is_told_from_its_newest_checkpoint_alone(finished_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.name != "train.log"}
    result = finished(finished_run)
    assert result.is_finished and result.step == 4
    assert result.metrics["val_loss"] == rows_of(finished_run)[1][4]["val_loss"]
    out = capsys.readouterr().out
    assert "this run is finished: 4 steps are done" in out and "fit with trainer.max_steps=8" in out
    after = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.name != "train.log"}
    assert after == before


def test_a_finished_run_is_marked_until_it_is_extended(finished_run, tmp_path):
    marker = json.loads((finished_run / "FINISHED").read_text())
    assert marker["step"] == 4 and "finished 4 steps" in marker["reason"]
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    (run_dir / "FINISHED").unlink()
    finished(run_dir)  # a run of an older version
    assert json.loads((run_dir / "FINISHED").read_text())["step"] == 4

    seen = []
    data = ToyData(on_batch=lambda _: seen.append((run_dir / "FINISHED").exists()))
    stopped = {"max_time_per_run": "00:00:00:00"}
    result = make_trainer(run_dir, max_steps=6, experiment=stopped).fit(ToyModel(), data)
    assert result.step == 5 and not any(seen)
    assert not (run_dir / "FINISHED").exists() and exit_code(result) == UNFINISHED
    result = make_trainer(run_dir, max_steps=6).fit(ToyModel(), ToyData())
    assert json.loads((run_dir / "FINISHED").read_text())["step"] == 6
    assert exit_code(result) == FINISHED


def test_a_stop_at_the_last_step_leaves_its_validation_to_the_next_start(tmp_path):
    stopped = {"max_time_per_run": "00:00:00:00"}
    result = make_trainer(tmp_path, max_steps=1, experiment=stopped).fit(ToyModel(), ToyData())
    assert result.step == 1 and not result.is_finished
    assert not (tmp_path / "FINISHED").exists() and not rows_of(tmp_path)[1]
    assert make_trainer(tmp_path, max_steps=1).fit(ToyModel(), ToyData()).is_finished
    assert (tmp_path / "FINISHED").exists() and list(rows_of(tmp_path)[1]) == [1]


def test_a_run_with_more_to_do_is_not_finished(finished_run, tmp_path):
    experiment = {**EXPERIMENT, "explicit_log_dir": str(finished_run)}
    assert make_trainer(max_steps=5).finished(experiment) is None
    assert make_trainer(max_steps=4).finished({**experiment, "resume_if_exists": False}) is None
    assert finished(tmp_path / "nothing") is None and not (tmp_path / "nothing").exists()
    damaged = tmp_path / "damaged"
    shutil.copytree(finished_run, damaged)
    shutil.rmtree(damaged / "checkpoints" / "4" / "progress")
    assert finished(damaged) is None


def test_a_validation_that_a_stop_left_undone_is_made_up_for_once(finished_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    step = run_dir / "checkpoints" / "4"
    checksums, progress = read_checksums(step), step / "progress" / "metadata"
    stored = json.loads(progress.read_text())
    progress.write_text(json.dumps({**stored, "validated_at": 3}))
    write_checksums(step, {n: v for n, v in checksums.notes.items() if n != RANKED})
    (run_dir / "checkpoints" / "ranking.json").unlink()
    (run_dir / "metrics.jsonl").write_text("")
    assert finished(run_dir) is None  # its last validation is missing
    for _ in range(2):
        make_trainer(run_dir, max_steps=4).fit(ToyModel(dropout=0.2), ToyData())
        assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1
    assert finished(run_dir) is not None


def test_the_checkpoints_are_named_with_the_best(finished_run, tmp_path):
    line = checkpoints_line(finished_run)
    assert line.startswith("checkpoints: step 4 is the last, step ") and "(val_loss " in line
    assert checkpoints_line(tmp_path) == ""


def test_the_next_commands_are_the_ones_that_were_typed(monkeypatch):
    words = ["train.py", "--config", "salm", "trainer.max_steps=20", "model.x='a b'"]
    monkeypatch.setattr(sys, "argv", words)
    over = next_line(Path("runs/salm"), step=20, is_finished=True)
    assert over == (
        "next: python evaluate.py  (report: runs/salm/report.html)  |  python train.py --config "
        """salm 'model.x='"'"'a b'"'"'' trainer.max_steps=40  to train longer"""
    )
    elsewhere = next_line(Path("mine/salm"), step=20, is_finished=True)
    assert "python evaluate.py pretrained_name=mine/salm  (report: mine/salm/report" in elsewhere
    stopped = next_line(Path("runs/salm"), step=7, is_finished=False)
    assert stopped.startswith("next: python train.py --config salm trainer.max_steps=20 ")


def test_without_train_py_the_next_step_is_a_call(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook"])
    assert next_line(None, step=5, is_finished=False) == "next: call fit again to resume"
    assert next_line(None, step=5, is_finished=True).startswith("next: fit with trainer.max_steps")


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "accumulate", "last"),
    [(7, None, 1, 7), (None, 2, 2, 4), (3, 2, 2, 3), (None, None, 1, None)],
)
def test_the_last_step_is_where_the_counting_finishes(max_steps, max_epochs, accumulate, last):
    intervals = Intervals(
        max_steps=max_steps,
        max_epochs=max_epochs,
        accumulate=accumulate,
        epoch_batches=3,
        validate_every=None,
        across_epochs=False,
    )
    assert intervals.last_step == last
    step = batches = 0
    while last is not None and not intervals.is_finished(step, batches):
        batches += intervals.window(batches)
        step += 1
    assert step == (last or 0)


def test_curves_are_a_page_and_tensorboard_if_the_run_wrote_for_it(tmp_path):
    page = f"curves: speechlm2-jax runs {tmp_path} --html {tmp_path}/curves.html"
    assert curves_line(tmp_path) == page
    (tmp_path / "tensorboard").mkdir()
    assert curves_line(tmp_path) == f"{page}  |  tensorboard --logdir {tmp_path}/tensorboard"


def test_curves_of_a_run_at_an_address_are_shown_from_there(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    line = curves_line(working_folder("memory://bucket/one"))
    assert line == "curves: speechlm2-jax runs memory://bucket/one --html curves.html"
