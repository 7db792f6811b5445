"""Reading ahead: in order, bounded by number and cost, and given up when it is closed."""

import threading
from concurrent.futures import CancelledError

import pytest

from speechlm2_jax.data.read_ahead import read_ahead


class Reader:
    """Counts what was begun, and reads nothing on until `gate` is open."""

    def __init__(self):
        self.begun, self.gate = [], threading.Event()

    def __call__(self, item):
        self.begun.append(item)
        self.gate.wait(10)
        return -item


def test_items_come_in_order_with_what_was_read():
    found = [(item, future.result()) for item, future in read_ahead(range(9), abs, ahead=3)]
    assert found == [(n, n) for n in range(9)]


def test_no_more_items_are_taken_than_asked_for():
    taken = []
    items = (taken.append(n) or n for n in range(9))
    reading = read_ahead(items, abs, ahead=3)
    assert taken == []
    next(reading)
    assert taken == [0, 1, 2]
    next(reading)
    assert taken == [0, 1, 2, 3]


def test_the_cost_bounds_what_is_read_and_one_item_always_is():
    reader = Reader()
    reader.gate.set()
    reading = read_ahead([5, 9, 1, 1, 1], reader, ahead=4, threads=1, cost=float, most=7.0)
    futures = []
    for begun in ([5], [5, 9], [5, 9, 1, 1, 1]):
        futures.append(next(reading)[1])
        futures[-1].result()
        assert reader.begun[: len(begun)] == begun
        assert len(reader.begun) <= len(begun)
    assert [future.result() for _, future in reading] == [-1, -1]


def test_an_error_is_raised_where_its_result_is_asked_for():
    reading = read_ahead(["1", "x", "2"], int, ahead=3)
    assert next(reading)[1].result() == 1
    with pytest.raises(ValueError, match="x"):
        next(reading)[1].result()
    assert next(reading)[1].result() == 2


def test_closing_cancels_what_has_not_begun_and_does_not_wait():
    reader = Reader()
    reading = read_ahead(range(9), reader, ahead=4, threads=1)
    (_, first), (_, second) = next(reading), next(reading)
    reading.close()
    reader.gate.set()
    assert first.result() == 0
    with pytest.raises(CancelledError):
        second.result()
