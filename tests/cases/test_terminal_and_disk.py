"""A disk that is full and an output that nobody reads: a few lines."""

import errno
import io
import logging
import os
import subprocess
import sys

import pytest

from speechlm2_jax import console, experiment
from speechlm2_jax.training.run.disk_errors import DiskError, RunLog, disk_errors, disk_problem
from speechlm2_jax.training.run.metrics_log import MetricsLog
from tests.training.toy import ToyData, ToyModel, make_trainer


def caused(cause):
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("cannot save step 5") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("cause", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS),
        (ValueError("RESOURCE_EXHAUSTED: Error writing local file"), errno.ENOSPC),
        (ValueError("x [OS error 30: EROFS Read-only file system]"), errno.EROFS),
        (ExceptionGroup("two", [ValueError("a"), OSError(errno.EFBIG, "b")]), errno.EFBIG),
        (FileNotFoundError(errno.ENOENT, "gone"), None),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"), None),
    ],
)
def test_what_a_disk_refuses_is_told_from_other_errors(cause, number):
    assert disk_problem(caused(cause)) == number


def test_a_full_disk_ends_a_run_with_what_is_left_and_what_to_do(tmp_path, monkeypatch):
    write = MetricsLog.write

    def full(self, row):
        if row["step"] == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))
        write(self, row)

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(DiskError) as raised:
        make_trainer(tmp_path).fit(ToyModel(), ToyData())
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{tmp_path} cannot be written: the disk is full"
    assert "metrics.jsonl" in lines[1]
    assert lines[2].endswith("the last complete checkpoint: step 3")
    assert "free some space" in lines[3] and len(lines) == 4
    monkeypatch.undo()
    assert make_trainer(tmp_path).fit(ToyModel(), ToyData()).is_finished


def test_a_recording_that_may_not_be_read_is_no_full_disk(tmp_path):
    with pytest.raises(PermissionError), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/a.wav")
    with pytest.raises(DiskError, match="writing is not permitted"), disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/metrics.jsonl")


def test_other_errors_of_a_run_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError


def test_a_program_ends_with_one_and_no_traceback(tmp_path):
    code = (
        "from speechlm2_jax import experiment\n"
        "from speechlm2_jax.training.run.disk_errors import disk_errors\n"
        "from pathlib import Path\n"
        f"with experiment.clear_errors('train.py'), disk_errors(Path({str(tmp_path)!r})):\n"
        "    raise OSError(28, 'No space left on device')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"train.py: {tmp_path} cannot be written: the disk is full\n")
    assert len(done.stderr.splitlines()) == 4


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capsys):
    handler = RunLog(tmp_path / "train.log")
    handler.stream.close()
    handler.stream = open("/dev/full", "w")  # noqa: SIM115  the handler closes it
    for number in range(3):
        handler.handle(logging.LogRecord("a", logging.INFO, "", 1, "line %d", (number,), None))
    handler.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(str(tmp_path / "train.log")) and "No space left" in line


def test_an_output_that_nobody_reads_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        console.ignore_closed_pipes()
        print("read", flush=True)
        assert os.read(reader, 10) == b"read\n"
        os.close(reader)
        print("not read", flush=True)
        with console.showing():
            console.log_line("nor this")
        print("and the file below goes nowhere, too", file=stream, flush=True)
        assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("name", ["train", "evaluate", "convert"])
def test_every_program_outlives_its_readers(name):
    root = experiment.Path(__file__).parents[2]
    script = (root / f"{name}.py").read_text().partition('if __name__ == "__main__":')[2]
    command = (root / "speechlm2_jax" / "commands" / f"{name}.py").read_text()
    assert "run(" in script
    run = command.partition("def run(")[2].partition("\ndef ")[0]
    assert "    console.ignore_closed_pipes()\n" in run
