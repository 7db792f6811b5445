"""The wall time of a process is accounted for, from its start to its end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speechlm2_jax.training.run import goodput
from speechlm2_jax.training.run.throughput import COMPUTE, KINDS, Throughput
from tests.training.tiny_salm import write_config
from tests.training.toy import ToyData, ToyModel, make_trainer

ROOT = Path(__file__).parents[2]


def times_of(run_dir):
    return goodput.time_rows(run_dir / "metrics.jsonl")


def test_the_parts_of_a_fit_add_up_to_its_wall_time(tmp_path):
    trainer, model = make_trainer(tmp_path, max_steps=3), ToyModel(dropout=0.2)
    slow = ToyData(on_batch=lambda _: time.sleep(0.05))
    began = time.time()
    trainer.fit(model, slow)
    (row,) = times_of(tmp_path)
    parts = {kind: row[f"time_{kind}_s"] for kind in (COMPUTE, *KINDS)}
    assert sum(parts.values()) == pytest.approx(row["time_total_s"])
    assert row["time_total_s"] == pytest.approx(row["time_ended"] - began, abs=0.15)
    assert parts["importing"] == 0.0 and parts["data_wait"] >= 0.15
    assert all(parts[kind] > 0 for kind in ("starting", "compiling", "validation", "saving"))


def test_the_start_of_a_process_is_counted_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(goodput, "process_age_s", lambda: 9.0)
    throughput = Throughput(["cpu"], clock=lambda: 0.0)
    goodput.add_start(throughput, 4.0, before_s=1.0)
    spent = throughput.totals()
    assert (spent["importing"], spent["starting"]) == (4.0, 5.0)
    for importing_s, age_s in ((None, 9.0), (4.0, None)):
        monkeypatch.setattr(goodput, "process_age_s", lambda age_s=age_s: age_s)
        throughput = Throughput(["cpu"], clock=lambda: 0.0)
        goodput.add_start(throughput, importing_s, before_s=1.0)
        assert throughput.totals() == {**dict.fromkeys((COMPUTE, *KINDS), 0.0), "starting": 1.0}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux has it")
def test_the_age_of_a_process_is_the_time_since_it_was_started():
    times = [time.monotonic()]
    first = goodput.process_age_s()
    times.append(time.monotonic())
    time.sleep(0.05)
    times.append(time.monotonic())
    second = goodput.process_age_s()
    times.append(time.monotonic())
    assert first is not None and second is not None
    tick_s = 0.02  # Linux counts in hundredths of a second
    assert times[2] - times[1] - tick_s <= second - first <= times[3] - times[0] + tick_s
    assert first > 0.1  # Python and JAX have been imported


def test_a_run_of_several_starts_has_the_goodput_of_all(tmp_path, capsys):
    data = ToyData()
    make_trainer(tmp_path, max_steps=1).fit(ToyModel(), data)
    assert " starts: " not in capsys.readouterr().out
    make_trainer(tmp_path, max_steps=3).fit(ToyModel(), data)
    rows = times_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 3]
    total_s = sum(row["time_total_s"] for row in rows)
    share = 100 * sum(row["time_compute_s"] for row in rows) / total_s
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("time "))
    assert f"goodput {100 * rows[1]['goodput']:.1f}% (of 2 starts: {total_s:.1f} s, " in line
    assert f"{share:.1f}%)" in line
    make_trainer(tmp_path, max_steps=3).fit(ToyModel(), data)  # takes no step
    assert times_of(tmp_path) == rows


@pytest.mark.slow  # a process that imports, compiles and trains
def test_all_wall_time_of_train_py_is_accounted_for_within_two_percent(tmp_path):
    config = write_config(
        tmp_path,
        trainer={"max_steps": 150, "limit_train_batches": 50, "precision": "32-true"},
    )
    words = ["--config", str(config), f"exp_manager.explicit_log_dir={tmp_path / 'run'}"]
    began, clock_s = time.monotonic(), time.time()
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    wall_s = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    (row,) = times_of(tmp_path / "run")
    print(wall_s, json.dumps(row))
    parts = {kind: row[f"time_{kind}_s"] for kind in (COMPUTE, *KINDS)}
    assert sum(parts.values()) == pytest.approx(row["time_total_s"])
    # the interpreter takes a second to end, after the last row; hours of training hide it
    ending_s = clock_s + wall_s - row["time_ended"]
    assert row["time_total_s"] == pytest.approx(wall_s - ending_s, rel=0.02)
    assert 0 < ending_s < 5
    assert parts["importing"] > 0.2 and parts["compiling"] > 0.2
    assert "goodput " in done.stdout
