"""One training per run directory: who gets the lock, who is told, and what a killed run leaves."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run import run_lock
from speechlm2_jax.training.run.run_lock import LOCK, Owner, acquire
from tests.training.toy import ToyData, ToyModel, make_trainer


def leave_lock(folder, silent_s=0.0, **changes):
    """Writes the lock of another process."""
    owner = replace(Owner.this_process(), **changes)
    path = folder / LOCK
    path.write_text(json.dumps(asdict(owner)))
    changed_s = time.time() - silent_s
    os.utime(path, (changed_s, changed_s))
    return owner


def ended_process():
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_names_its_owner_and_goes_with_the_release(tmp_path):
    lock = acquire(tmp_path)
    written = json.loads((tmp_path / LOCK).read_text())
    assert (written["host"], written["pid"]) == (socket.gethostname(), os.getpid())
    assert acquire(tmp_path) is lock  # the parts of one process share it
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_live_process_keeps_its_lock(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = run_lock._process_start(child.pid)
    owner = leave_lock(tmp_path, pid=child.pid, process_start=start, silent_s=1e6)
    message = (
        f"{tmp_path} is in use by another training: process {child.pid} on {owner.host}, since"
    )
    with pytest.raises(SettingsError, match=message):
        acquire(tmp_path)
    child.kill()  # not waited for: the process table still has it
    while run_lock._process_start(child.pid) is not None:
        time.sleep(0.01)
    acquire(tmp_path).release()
    child.communicate()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pid": None}, "is gone"),
        ({"process_start": "1"}, "is gone"),  # the number belongs to another process by now
        ({"host": "elsewhere", "silent_s": 130}, "has been silent for 1"),
    ],
)
def test_a_stale_lock_is_taken_over_with_one_line(tmp_path, caplog, changes, reason):
    changes = {k: ended_process() if v is None else v for k, v in changes.items()}
    owner = leave_lock(tmp_path, **changes)
    lock = acquire(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"taking over {tmp_path}: {owner} (")
    assert reason in line
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"machine": "another container"}])
def test_another_machine_has_two_minutes(tmp_path, changes):
    leave_lock(tmp_path, **changes, silent_s=110)
    with pytest.raises(SettingsError, match="in use by another training"):
        acquire(tmp_path)


@pytest.fixture
def short_silence(monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 0.5)
    monkeypatch.setattr(run_lock, "UNREADABLE_S", 0.05)


@pytest.mark.parametrize("is_readable", [True, False])
def test_a_lock_from_the_future_is_watched_and_taken_over(
    tmp_path, caplog, short_silence, is_readable
):
    """Its machine's clock is ahead, or this one's was set back: no age tells that it is stale."""
    leave_lock(tmp_path, host="elsewhere", silent_s=-3600)
    if not is_readable:
        (tmp_path / LOCK).write_text("{")
        os.utime(tmp_path / LOCK, (time.time() + 3600,) * 2)
    lock = acquire(tmp_path)
    waiting, taking = (record.getMessage() for record in caplog.records)
    assert f"{tmp_path}: the lock of " in waiting and "s in the future; waiting up to" in waiting
    assert "has not renewed its time stamp" in taking
    assert abs((tmp_path / LOCK).stat().st_mtime - time.time()) < 10
    lock.release()


def test_a_lock_from_the_future_that_is_renewed_is_in_use(tmp_path, short_silence):
    leave_lock(tmp_path, host="elsewhere", silent_s=-3600)
    is_over = threading.Event()

    def renew():
        while not is_over.wait(0.02):
            os.utime(tmp_path / LOCK, (time.time() + 3600,) * 2)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(SettingsError, match="in use by another training"):
        acquire(tmp_path)
    is_over.set()
    thread.join()


def test_a_lock_from_the_future_that_is_released_is_free(tmp_path, short_silence):
    leave_lock(tmp_path, host="elsewhere", silent_s=-3600)
    timer = threading.Timer(0.1, (tmp_path / LOCK).unlink)
    timer.start()
    acquire(tmp_path).release()
    timer.join()


def test_a_little_ahead_is_no_other_clock(tmp_path, caplog):
    leave_lock(tmp_path, host="elsewhere", silent_s=-60)
    with pytest.raises(SettingsError, match="in use by another training"):
        acquire(tmp_path)
    assert not caplog.records


def test_a_live_process_here_is_told_by_its_number_whatever_the_stamp(tmp_path):
    leave_lock(tmp_path, silent_s=-3600)
    with pytest.raises(SettingsError, match="in use by another training"):
        acquire(tmp_path)
    leave_lock(tmp_path, pid=ended_process(), silent_s=-3600)
    acquire(tmp_path).release()


def test_a_lock_that_cannot_be_read_has_two_minutes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "UNREADABLE_S", 0.05)
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(SettingsError, match="an unknown process"):
        acquire(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    acquire(tmp_path).release()


@pytest.mark.parametrize("is_stale", [False, True])
@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_starts_at_once_one_gets_the_lock(tmp_path, monkeypatch, is_stale, has_links):
    def no_link(*_):
        raise OSError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_link)
    for attempt in range(10):
        path = tmp_path / f"{attempt}" / LOCK
        path.parent.mkdir()
        if is_stale:
            leave_lock(path.parent, pid=ended_process())
        got, refused = [], []
        gate = threading.Barrier(8)

        def start(path=path, gate=gate, got=got, refused=refused):
            gate.wait()
            try:
                got.append(run_lock._take(path))
            except SettingsError:
                refused.append(1)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 7)
        assert json.loads(path.read_text())["token"] == got[0]
        assert [file.name for file in path.parent.iterdir()] == [LOCK]


def test_the_time_stamp_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    lock = acquire(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_who_was_silent_too_long_ends_without_saving(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    ended = threading.Event()
    words = []
    monkeypatch.setattr(run_lock, "exit_now", lambda text: (words.append(text), ended.set()))
    lock = acquire(tmp_path)
    other = leave_lock(tmp_path, host="elsewhere")
    assert ended.wait(10)
    lock.release()
    assert "another process has taken over this run directory" in words[0]
    assert json.loads((tmp_path / LOCK).read_text())["token"] == other.token


def test_fit_holds_the_lock_and_releases_it_after_errors_too(tmp_path):
    seen = []

    class Looking(ToyData):
        def setup(self, **options):
            seen.append((tmp_path / LOCK).exists())
            super().setup(**options)
            with pytest.raises(SettingsError, match="this process already trains there"):
                make_trainer(tmp_path).fit(ToyModel(), ToyData())
            raise SettingsError("data.train_ds: no")

    with pytest.raises(SettingsError, match=r"data\.train_ds: no"):
        make_trainer(tmp_path).fit(ToyModel(), Looking())
    assert seen == [True]
    assert not (tmp_path / LOCK).exists()
