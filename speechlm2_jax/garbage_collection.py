"""Python's garbage collector, while a program starts."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def paused() -> Generator[None]:
    """Imports modules and builds a model without searching them for garbage.

    There is hardly any, and the search is slow: it took 0.7 s of the 3.4 s of processor time of a
    short `transcribe`. What is there at the end is left out of later collections too. Does nothing
    where the collector is off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
