"""Reads with a time limit: their threads are used again, and left behind where a read hangs."""

import gc
import threading
import time

import pytest

from speechlm2_jax.data.time_limit import MOST_STALLED, TimeLimit
from speechlm2_jax.settings import SettingsError


def late(item: int) -> str:
    return f"late {item}"


def test_one_thread_reads_call_after_call_and_ends_with_its_limit() -> None:
    limit, threads = TimeLimit(60.0), set[threading.Thread]()

    def read(item: int) -> str:
        threads.add(threading.current_thread())
        return str(item)

    for _ in range(5):
        assert limit.read_all([1, 2], read, late, str) == ["1", "2"]
    (thread,) = threads
    assert thread is not threading.current_thread()
    del limit
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_what_hangs_is_late_and_the_rest_is_read_by_another_thread() -> None:
    limit, release = TimeLimit(0.05), threading.Event()

    def read(item: int) -> str:
        if item == 2:
            release.wait(30)
        return f"{item} by {threading.get_ident()}"

    try:
        first, second, third = limit.read_all([1, 2, 3], read, late, str)
        assert second == "late 2"
        assert first.startswith("1 by ") and third.startswith("3 by ")
        assert first.split()[-1] != third.split()[-1]
    finally:
        release.set()


def test_reads_that_came_back_do_not_count_as_lost() -> None:
    limit = TimeLimit(0.05)

    def slow(item: int) -> str:
        time.sleep(0.15)
        return str(item)

    for _ in range(MOST_STALLED):
        assert limit.read_all([7], slow, late, str) == ["late 7"]
        time.sleep(0.3)  # until it is read

    release = threading.Event()
    try:
        with pytest.raises(SettingsError, match="does not deliver"):
            for item in range(MOST_STALLED):
                limit.read_all([item], lambda _: release.wait(30), late, str)
    finally:
        release.set()


def test_an_error_is_raised_where_it_is_waited_for() -> None:
    def broken(item: int) -> str:
        raise OSError(f"cannot read {item}")

    with pytest.raises(OSError, match="cannot read 3"):
        TimeLimit(60.0).read_all([3], broken, late, str)
