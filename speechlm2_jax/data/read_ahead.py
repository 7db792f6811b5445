"""Reads items in threads before they are asked for: in order, and only so far ahead.

Of evaluation, and of the survey of an index. Training reads by Grain (`pipeline.py`), which cannot
do what these need: bound what is read by a cost (seconds of audio) instead of a number of items,
give an error in place of its own item and go on, and be imported in less than a second.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 4
"""Threads that read recordings for one device."""
Item = TypeVar("Item")
Read = TypeVar("Read")


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    *,
    ahead: int,
    threads: int = READERS,
    cost: Callable[[Item], float] = lambda _: 0.0,
    most: float = math.inf,
) -> Generator[tuple[Item, Future[Read]]]:
    """Yields each item with the future of `read(item)`, in order.

    Up to `ahead` items are being read or waiting, of together at most `most` by their `cost`, and
    always at least one. Closing the generator cancels the others and does not wait for them.
    """
    rest = iter(items)
    next_one: list[Item] = []
    """Taken from `rest`, and too much to be read yet."""
    reading: deque[tuple[Item, Future[Read]]] = deque()
    held = 0.0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read_ahead")
    try:
        while True:
            while len(reading) < ahead:
                next_one = next_one or list(itertools.islice(rest, 1))
                if not next_one or (reading and held + cost(next_one[0]) > most):
                    break
                held += cost(next_one[0])
                reading.append((next_one[0], pool.submit(read, next_one.pop())))
            if not reading:
                return
            held -= cost(reading[0][0])
            yield reading.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for reads
