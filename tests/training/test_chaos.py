"""Kills, stalls and full disks at random moments: a run loses no step and changes no number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.chaos import difference, rows

ROOT = Path(__file__).parents[2]
ROUNDS, STEPS = 30, 90


def write(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows(folder)


def test_runs_are_compared_by_their_numbers_alone(tmp_path):
    steps = [{"step": n, "loss": 1 / n, "wall_s": 0.1} for n in (1, 2, 3)]
    validation = {"step": 3, "val_loss": 0.5}
    one = write(tmp_path / "one", [*steps, validation, {"step": 3, "time_s": {}}])
    later = [{**row, "wall_s": 7.0} for row in steps]
    assert difference(one, write(tmp_path / "later", [*later, validation])) is None
    twice = write(tmp_path / "twice", [steps[0], *steps, validation])
    assert "row 1: " in str(difference(one, twice))
    assert difference(one, write(tmp_path / "short", steps)) == "4 and 3 rows"
    other = write(tmp_path / "other", [*steps, {"step": 3, "val_loss": 0.5000001}])
    assert "row 3: " in str(difference(one, other))
    with (tmp_path / "one" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert rows(tmp_path / "one") == one and rows(tmp_path) == []


@pytest.mark.slow  # a quarter of an hour: some thirty starts of four processes
def test_four_processes_end_with_the_numbers_of_an_undisturbed_run(tmp_path):
    program = ROOT / "tests" / "training" / "toy_processes.py"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "TOY_CACHE": str(tmp_path / "compiled"),
    }
    chaos = [sys.executable, "-m", "tools.chaos", str(tmp_path), "--rounds", str(ROUNDS)]
    done = subprocess.run(
        [*chaos, "--", str(program), "{run}", str(STEPS)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    tail = (tmp_path / "rounds.log").read_text()[-5000:]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{tail}"
    assert f"round {ROUNDS} of {ROUNDS}" in done.stdout
    assert done.stdout.endswith("rows are those of an undisturbed run\n")
