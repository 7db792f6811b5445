"""Profiles a few training steps. XProf, TensorBoard and Perfetto show the trace."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jaxtyping import PyTree

log = logging.getLogger(__name__)
FOLDER = "profile"


class StepProfiler:
    """Traces the optimizer steps `first` to `last`, counted as in the log, into a folder."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self.first, self.last = steps or (0, 0)
        self.folder = folder
        self._is_running = False

    def before(self, step: int) -> None:
        """Starts the trace if the next step, `step`, is the first to trace."""
        if step == self.first and jax.process_index() == 0:
            jax.profiler.start_trace(str(self.folder))
            self._is_running = True

    def after(self, step: int, state: PyTree) -> None:
        """Ends the trace after its last step, once the device has computed `state`."""
        if self._is_running and step >= self.last:
            jax.block_until_ready(state)
            self._end()

    @contextmanager
    def closing(self) -> Iterator["StepProfiler"]:
        """Ends the trace on exit if the run stopped before the last step to trace."""
        try:
            yield self
        finally:
            if self._is_running:
                self._end()

    def _end(self) -> None:
        self._is_running = False
        jax.profiler.stop_trace()
        log.info("trace of steps %d to %d: %s", self.first, self.last, self.folder)
