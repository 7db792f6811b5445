"""A trace of a few training steps, for XProf, TensorBoard and Perfetto."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)
FOLDER = "profile"


class StepProfiler:
    """Traces the optimizer steps `first` to `last`, counted as in the log, into a folder."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self.first, self.last = steps or (0, 0)
        self.folder = folder
        self._is_running = False

    def before(self, step: int) -> None:
        """Starts the trace if `step`, which comes next, is the first of it."""
        if step == self.first and jax.process_index() == 0:
            jax.profiler.start_trace(str(self.folder))
            self._is_running = True

    def after(self, step: int, state: Any) -> None:
        """Ends the trace if `step` was the last of it, when the device has done it."""
        if self._is_running and step >= self.last:
            jax.block_until_ready(state)
            self._end()

    @contextmanager
    def closing(self) -> Iterator["StepProfiler"]:
        """Ends a trace that the run did not reach the end of."""
        try:
            yield self
        finally:
            if self._is_running:
                self._end()

    def _end(self) -> None:
        self._is_running = False
        jax.profiler.stop_trace()
        log.info("trace of steps %d to %d: %s", self.first, self.last, self.folder)
