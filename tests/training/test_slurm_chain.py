"""Jobs are submitted until the run is finished; sbatch is a program of the test."""

import json
import os
import sys
from pathlib import Path

import pytest

from speechlm2_jax import launch, slurm_chain
from speechlm2_jax.exit_codes import BAD_INPUT, FAILED, FINISHED, STALLED, UNFINISHED
from tests.object_store.emulated import use_stores
from tests.training.tiny_salm import write_config

ROOT = Path(__file__).parents[2]
FAKE = """#!{python}
import json, os, sys
from pathlib import Path
folder, run = Path({folder!r}), Path({run!r})
(folder / "calls").open("a").write(json.dumps(sys.argv[1:]) + "\\n")
number = len((folder / "calls").read_text().splitlines()) - 1
plan = json.loads((folder / "plan").read_text())
step, code = plan[number]
if code is None:
    sys.exit("sbatch: error: Socket timed out")
print(f"10{{number}};cluster", flush=True)
if step is not None:
    (run / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
if code == 0:
    (run / "FINISHED").write_text("{{}}")
sys.exit(code)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A function that runs a chain whose jobs reach the given steps and end with the codes."""
    run = tmp_path / "run"

    def chain(plan, *options):
        sbatch = tmp_path / "bin" / "sbatch"
        sbatch.parent.mkdir(exist_ok=True)
        sbatch.write_text(FAKE.format(python=sys.executable, folder=str(tmp_path), run=str(run)))
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
        (tmp_path / "plan").write_text(json.dumps(plan))
        (tmp_path / "calls").unlink(missing_ok=True)
        code = slurm_chain.main(["--pause", "0", *options, str(run), "--time=1", "job.sh"])
        calls = tmp_path / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return code, [json.loads(line) for line in lines]

    return chain


def test_jobs_follow_each_other_until_the_run_is_finished(cluster, capsys):
    plan = [(None, UNFINISHED), (5, UNFINISHED), (5, FAILED), (8, STALLED), (12, FINISHED)]
    code, calls = cluster(plan)
    assert code == FINISHED and len(calls) == 5
    assert calls[0] == ["--wait", "--parsable", "--dependency=singleton", "--time=1", "job.sh"]
    out = capsys.readouterr().out
    assert "job 101 ended with 75; last checkpoint: step 5" in out and "is finished" in out
    assert cluster([]) == (FINISHED, [])  # nothing is submitted for a finished run


def test_jobs_without_progress_end_the_chain(cluster, capsys):
    plan = [(3, UNFINISHED), (3, FAILED), (None, None), (4, UNFINISHED), (4, FAILED), (4, FAILED)]
    code, calls = cluster([*plan, (9, FINISHED)], "--attempts", "2")
    assert code == FAILED and len(calls) == 3
    assert "2 jobs in a row added no checkpoint" in capsys.readouterr().out
    code, calls = cluster(plan[3:], "--attempts", "2")
    assert code == FAILED and len(calls) == 3


def test_a_run_in_an_object_store_is_followed_by_what_is_whole_there(tmp_path, monkeypatch, capsys):
    assert slurm_chain.main(["gs://bucket/run", "job.sh"]) == BAD_INPUT  # without its package
    assert "gs://bucket/run: " in capsys.readouterr().out
    use_stores(tmp_path, monkeypatch)
    chain = slurm_chain.Chain(run_dir="gs://bucket/run", sbatch=["job.sh"])
    assert chain._last_step() is None and not chain._is_finished()
    run = tmp_path / "gs" / "bucket" / "run"
    for name in ("committed/9", "committed/12", "committed/frozen", "checkpoints/15/a"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    assert chain._last_step() == 12 and not chain._is_finished()
    (run / "FINISHED").write_text("{}")
    assert slurm_chain.main(["gs://bucket/run", "job.sh"]) == FINISHED


def test_refused_settings_end_the_chain_at_once(cluster):
    assert cluster([(None, BAD_INPUT), (9, FINISHED)])[0] == BAD_INPUT


def test_a_machine_without_sbatch_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_chain.main([str(tmp_path / "run"), "job.sh"]) == BAD_INPUT
    assert "sbatch is not found" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        slurm_chain.main([str(tmp_path / "run")])


@pytest.mark.parametrize(("second", "expected"), [(UNFINISHED, UNFINISHED), (FAILED, FAILED)])
def test_a_stopped_run_of_several_processes_is_no_failure(tmp_path, capfd, second, expected):
    script = tmp_path / "end.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1':\n"
        "    time.sleep(0.3)\n"
        f"    sys.exit({second})\n"
        f"sys.exit({UNFINISHED})\n"
    )
    processes = launch.Processes([str(script)], 2, dict(os.environ))
    assert processes.wait() == expected
    told = capfd.readouterr().err
    assert ("process 1 of 2 ended with code 1" in told) == (expected == FAILED)
    assert expected == FAILED or "launch:" not in told


JOB = """#!/bin/bash
{python} train.py --config {config} exp_manager.explicit_log_dir={run} {stop} | tee -a {out}
exit ${{PIPESTATUS[0]}}
"""
RUNNING = """#!{python}
import subprocess, sys
from pathlib import Path
jobs = Path({folder!r}) / "jobs"
number = len(jobs.read_text().splitlines()) if jobs.exists() else 0
print(number, flush=True)
code = subprocess.run(["bash", sys.argv[-1]], stdout=sys.stderr).returncode
jobs.open("a").write(f"{{code}}\\n")
sys.exit(code)
"""


@pytest.mark.slow  # trains in several processes
def test_a_chain_of_real_jobs_with_a_time_limit_trains_to_the_end(tmp_path, monkeypatch):
    steps = 4
    config = write_config(
        tmp_path, trainer={"max_steps": steps, "limit_train_batches": 50, "precision": "32-true"}
    )
    run, sbatch, job = tmp_path / "run", tmp_path / "bin" / "sbatch", tmp_path / "job.sh"
    sbatch.parent.mkdir()
    sbatch.write_text(RUNNING.format(python=sys.executable, folder=str(tmp_path)))
    sbatch.chmod(0o755)
    # one step in each job, and no validation, which the limit would interrupt each time
    limit = "+exp_manager.max_time_per_run=00:00:00:00 +trainer.limit_val_batches=0"
    names = {"python": sys.executable, "config": config, "run": run, "out": tmp_path / "out"}
    job.write_text(JOB.format(**names, stop=limit))
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(ROOT)
    assert slurm_chain.main([str(run), str(job)]) == FINISHED
    codes = [int(line) for line in (tmp_path / "jobs").read_text().splitlines()]
    assert codes[-1] == FINISHED and set(codes[:-1]) == {UNFINISHED}
    assert json.loads((run / "FINISHED").read_text())["step"] == steps
    assert len(codes) >= steps
