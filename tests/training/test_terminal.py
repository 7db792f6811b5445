"""What a person at the terminal sees: lines, phases, the bar, and what the log keeps of it."""

import io
import subprocess
import sys
import time
from contextlib import redirect_stdout

import pytest

from speechlm2_jax import console
from speechlm2_jax.console import ProgressBar, log_line, one_line_errors, phase, showing
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.metrics_log import format_progress
from speechlm2_jax.training.run.throughput import Pace, Throughput
from tests.training.toy import ToyData, ToyModel, make_trainer


class Screen(io.StringIO):
    """A terminal as far as programs ask."""

    def isatty(self):
        return True

    def lines(self):
        """What is left to read: of what was drawn over, the last."""
        return [line.rpartition("\r")[2].rstrip() for line in self.getvalue().split("\n")]


def test_the_first_line_waits_for_neither_jax_nor_numpy():
    code = (
        "import sys; import speechlm2_jax.settings; from speechlm2_jax import console; "
        "print([name for name in ('jax', 'numpy', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_long_phase_logs_its_start_its_progress_and_its_duration(monkeypatch, capsys):
    monkeypatch.setattr(console, "FIRST_NOTE_S", 0.02)
    monkeypatch.setattr(console, "NEXT_NOTES_S", 0.05)
    with showing(), phase("loading weights"):
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading weights ..."
    assert lines[1].startswith("loading weights ... 0 s")
    assert lines[-1].startswith("loading weights took 0.")


def test_a_short_phase_and_a_failed_one_say_nothing(capsys):
    with showing():
        with phase("reading"):
            pass
        with pytest.raises(KeyError), phase("reading"):
            raise KeyError
    assert capsys.readouterr().out == ""


def test_log_lines_and_the_bar_do_not_fight():
    with redirect_stdout(Screen()) as screen, showing():
        bar = ProgressBar(total=3, done=1, is_wanted=True)
        assert bar.is_drawn
        bar.draw(2, "loss 1.5")
        log_line("saving checkpoint of step 2")
        bar.draw(3, "loss 1.25")
        log_line("finished 3 steps")
        bar.close()
        log_line("next")
    assert screen.lines() == ["saving checkpoint of step 2", "finished 3 steps", "next", ""]
    assert "loss 1.5" in screen.getvalue() and "100%" in screen.getvalue()


@pytest.mark.parametrize("is_wanted", [True, False])
def test_no_bar_in_a_file_or_where_it_is_not_wanted(is_wanted):
    with redirect_stdout(io.StringIO() if is_wanted else Screen()) as out:
        bar = ProgressBar(total=3, done=0, is_wanted=is_wanted)
        bar.draw(1, "loss")
        bar.close()
    assert not bar.is_drawn and out.getvalue() == ""


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_run_draws_loss_rate_speed_and_what_is_left(is_wanted):
    trainer = make_trainer(max_steps=4, enable_progress_bar=is_wanted, log_every_n_steps=2)
    with redirect_stdout(Screen()) as screen:
        trainer.fit(ToyModel(dropout=0.2), ToyData())
    drawn = [part for part in screen.getvalue().split("\r") if "steps/s" in part]
    assert bool(drawn) == is_wanted
    if is_wanted:
        words = ("4/4", "loss ", "lr 1.0e-02", "steps/s", "tokens/s", "left")
        assert all(word in drawn[-1] for word in words), drawn[-1]
    logged = [line for line in screen.lines() if "grad norm" in line]
    assert [line.split("  ")[0] for line in logged] == ["step 2/4", "step 4/4"]


def test_the_first_loss_is_told_at_once_and_leaves_no_row(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=3, log_every_n_steps=3)
    trainer.fit(ToyModel(dropout=0.2), ToyData())
    first, *_ = [s for s in capsys.readouterr().out.splitlines() if s.startswith("step ")]
    assert first.startswith("step 1/3  loss ") and "first step after (re)start" in first
    assert '"step": 1,' not in (tmp_path / "metrics.jsonl").read_text()


def test_lines_before_the_run_directory_are_in_its_log(tmp_path, capsys):
    with showing():
        log_line("reading the settings")
        make_trainer(tmp_path, max_steps=1).fit(ToyModel(), ToyData())
    assert capsys.readouterr().out.count("reading the settings") == 1
    log = (tmp_path / "train.log").read_text()
    assert log.count("reading the settings") == 1
    assert log.count("finished 1 steps") == 1


def test_the_pace_is_of_late_and_the_rest_counts_validation():
    now = [0.0]
    throughput = Throughput(["cpu"], clock=lambda: now[0])
    with throughput.measure("starting"):
        now[0] += 100.0
    for seconds in (5.0, *[1.0] * 30):
        now[0] += seconds
        throughput.add_batch(tokens=7, padded=9, flops=1.0)
        throughput.add_step()
        with throughput.measure("validation"):
            now[0] += 2.0
    pace = throughput.pace(10)
    assert pace == Pace(steps_per_s=1.0, tokens_per_s=7.0, left_s=10 * 97 / 31)
    assert format_progress(0.5, 1e-3, pace).endswith("1.00 steps/s  7 tokens/s  0:31 left")


def test_ctrl_c_before_training_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors("train.py", [SettingsError]):
        raise KeyboardInterrupt
    assert stopped.value.code == console.INTERRUPTED
    assert capsys.readouterr().err == "train.py: interrupted; nothing was changed\n"
