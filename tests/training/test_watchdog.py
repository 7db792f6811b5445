"""The watchdog ends a run that stalls, with its stacks; it leaves slow compilations alone."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from speechlm2_jax.exit_codes import STALLED
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.watchdog import COMPILING, Watchdog
from tests.training.toy import make_trainer

ROOT = Path(__file__).parents[2]
LIMIT_S = 0.4


def watched(act, run_dir=None):
    """The exit codes that a watchdog gave while `act(watchdog)` ran."""
    codes = []
    watchdog = Watchdog(LIMIT_S, run_dir, end=codes.append)
    with watchdog.watching():
        act(watchdog)
    return codes


def repeat(sign):
    """A run that gives a sign for three limits."""

    def act(watchdog):
        for step in range(30):
            sign(watchdog, step)
            time.sleep(LIMIT_S / 10)

    return act


def test_a_stall_ends_the_process_once_and_shows_every_stack(tmp_path, capfd):
    (tmp_path / "train.log").write_text("step 7\n")
    waiting = threading.Event()
    blocked = threading.Thread(target=waiting.wait, name="blocked")
    blocked.start()

    def stall_here(watchdog):
        watchdog.step_ended(7)
        watchdog.changed("data_wait")
        time.sleep(4 * LIMIT_S)

    assert watched(stall_here, tmp_path) == [STALLED]
    waiting.set()
    blocked.join()
    for text in (capfd.readouterr().err, (tmp_path / "train.log").read_text()):
        assert "watchdog: process 0 made no progress for 0 s after step 7" in text
        assert "(last seen: data wait)" in text and "exit code 70" in text
        assert "in stall_here" in text and "in wait" in text
    assert (tmp_path / "train.log").read_text().startswith("step 7\n")


@pytest.mark.parametrize(
    "sign",
    [
        lambda watchdog, step: watchdog.step_ended(step),
        lambda watchdog, step: watchdog.changed("validation"),
        lambda watchdog, step: watchdog.changed(COMPILING) if step == 0 else None,
    ],
    ids=["steps", "validation batches", "one long compilation"],
)
def test_progress_and_compiling_are_no_stall(sign):
    assert watched(repeat(sign)) == []


def test_a_step_after_a_compilation_may_take_longer_as_others_may_still_compile():
    def act(watchdog):
        watchdog.changed(COMPILING)
        watchdog.changed("compute")
        time.sleep(2 * LIMIT_S)

    def later(watchdog):
        act(watchdog)
        watchdog.step_ended(1)
        time.sleep(2 * LIMIT_S)

    assert watched(act) == [] and watched(later) == [STALLED]


def test_a_compilation_outside_the_measured_ones_is_seen_in_the_stack(tmp_path):
    folder = tmp_path / "jax" / "_src"
    folder.mkdir(parents=True)
    code = compile("import time\ndef f(s): time.sleep(s)", str(folder / "compiler.py"), "exec")
    names = {}
    exec(code, names)
    assert watched(lambda _: names["f"](3 * LIMIT_S)) == []


def test_without_a_limit_nothing_watches():
    before = threading.active_count()
    with Watchdog(None, None).watching():
        assert threading.active_count() == before


@pytest.mark.parametrize("limit", [0, -1.0])
def test_limits_that_make_no_sense_are_refused(limit):
    with pytest.raises(SettingsError, match=r"trainer.*watchdog_s"):
        make_trainer(watchdog_s=limit)


@pytest.mark.slow  # a process that imports JAX
def test_a_training_that_stalls_ends_with_its_own_exit_code(tmp_path):
    script = tmp_path / "stall.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.training.toy import ToyData, ToyModel, make_trainer\n"
        "data = ToyData(on_batch=lambda index: time.sleep(600) if index == 3 else None)\n"
        "make_trainer(Path(sys.argv[1]), watchdog_s=1.0).fit(ToyModel(), data)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == STALLED, done.stderr
    assert "made no progress for" in done.stderr and "stall.py" in done.stderr
    assert "stall.py" in (tmp_path / "run" / "train.log").read_text()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["step"] == 1
