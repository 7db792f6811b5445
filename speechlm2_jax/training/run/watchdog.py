"""Ends a run that makes no progress, after it has written what every thread was doing.

A collective operation that waits for a process that left it, a device that does not respond, or a
disk that hangs would otherwise hold all machines of a run until somebody looks.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

import jax

from speechlm2_jax.exit_codes import STALLED
from speechlm2_jax.training.run.directory import LOG

log = logging.getLogger(__name__)

COMPILING = "compiling"
AFTER_COMPILING = 4
"""A step after a compilation may take so many limits: other processes may still compile."""
POLLS = 20
"""Looks per limit."""
LONGEST_POLL_S = 10.0
WRITING_S = 10.0
"""How long to wait for train.log, whose disk may be what hangs."""
_COMPILER = os.path.join("jax", "_src", "compiler.py")


class Watchdog:
    """Ends the process if `limit_s` pass without a sign of progress while it watches.

    Signs are the end of a step, of a compilation, of a validation batch, and of each wait for data
    or a checkpoint. Time of compiling, and time in which the process was suspended, do not count.
    """

    def __init__(
        self,
        limit_s: float | None,
        run_dir: Path | None,
        end: Callable[[int], object] = os._exit,
    ):
        """`limit_s` is None for no limit. `end` ends the process with an exit code."""
        self.limit_s, self._run_dir, self._end = limit_s, run_dir, end
        self._kind, self._signs, self._steps = "", 0, 0
        self._has_compiled = False
        self._thread: int | None = None

    def changed(self, kind: str) -> None:
        """Notes that the loop does something else now: a kind of time (`Throughput`)."""
        self._has_compiled |= self._kind == COMPILING
        self._kind = kind
        self._signs += 1

    def step_ended(self, step: int) -> None:
        """Notes that the report of a step was read."""
        self._steps, self._has_compiled = step, False
        self._signs += 1

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watches the calling thread until the context ends."""
        if not self.limit_s:
            yield
            return
        self._thread = threading.get_ident()
        is_over = threading.Event()
        watcher = threading.Thread(
            target=self._watch, args=(self.limit_s, is_over), name="watchdog", daemon=True
        )
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join(WRITING_S)

    def _watch(self, limit_s: float, is_over: threading.Event) -> None:
        poll_s = min(limit_s / POLLS, LONGEST_POLL_S)
        before, silent_s, signs = time.monotonic(), 0.0, self._signs
        while not is_over.wait(poll_s):
            now = time.monotonic()
            # a suspended process wakes with a long pause behind it, which is nobody's fault
            silent_s = silent_s + min(now - before, 2 * poll_s) if signs == self._signs else 0.0
            before, signs = now, self._signs
            allowed_s = limit_s * (AFTER_COMPILING if self._has_compiled else 1)
            if silent_s >= allowed_s and not self._is_compiling():
                return self._give_up(silent_s)

    def _is_compiling(self) -> bool:
        """Whether the watched thread compiles, by its kind of time or by its stack."""
        if self._kind == COMPILING:
            return True
        frame: FrameType | None = sys._current_frames().get(self._thread or 0)
        while frame is not None:
            if frame.f_code.co_filename.endswith(_COMPILER):
                return True
            frame = frame.f_back
        return False

    def _give_up(self, silent_s: float) -> None:
        doing = self._kind.replace("_", " ") or "training"
        message = (
            f"watchdog: process {jax.process_index()} made no progress for {silent_s:.0f} s after "
            f"step {self._steps} (last seen: {doing}); the stacks of all threads follow. It ends "
            f"with exit code {STALLED}; the same command resumes from the last checkpoint. "
            "trainer.watchdog_s sets the limit"
        )
        for target in (sys.__stderr__, self._log_file()):
            writer = threading.Thread(target=_write_stacks, args=(target, message), daemon=True)
            writer.start()
            writer.join(WRITING_S)
        self._end(STALLED)

    def _log_file(self) -> Path | None:
        """train.log; train.1.log and so on of other processes than the first."""
        if self._run_dir is None:
            return None
        path, index = self._run_dir / LOG, jax.process_index()
        return path.with_suffix(f".{index}{path.suffix}") if index else path


def _write_stacks(target: TextIO | Path | None, message: str) -> None:
    """Writes the message and all stacks to a stream or, appended, to a file."""
    with suppress(OSError, ValueError):
        if isinstance(target, Path):
            with target.open("a", encoding="utf-8") as file:
                _write_stacks(file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")
        elif target is not None:
            print(message, file=target, flush=True)
            faulthandler.dump_traceback(file=target, all_threads=True)
