"""Reads the reports of training steps: counts skipped steps, logs, draws the progress bar.

The host dispatches steps ahead of the device. It reads the report of a step only when the step is
likely to be finished, or when a log line needs it, so that the device never waits for the host.
"""

import logging
from collections import deque
from dataclasses import asdict, dataclass, field

import jax

from speechlm2_jax.training.run.metrics_log import Row, format_progress, format_step
from speechlm2_jax.training.run.run_state import RunContext, RunProgress
from speechlm2_jax.training.step import StepReport

log = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2
"""Steps dispatched before the oldest report is read: enough to keep the device busy."""
MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class DispatchedStep:
    """A step whose computation was dispatched to the device."""

    step: int
    learning_rate: float
    ids: tuple[str, ...]
    report: StepReport
    """Scalars on the device until they are read, then on the host."""


@dataclass
class Reporter:
    """Reads the reports of one run's steps."""

    context: RunContext
    progress: RunProgress
    has_diverged: bool = False
    """True after too many skipped steps in a row."""
    _pending: deque[DispatchedStep] = field(default_factory=deque)
    _last: DispatchedStep | None = None

    def add(self, step: DispatchedStep) -> None:
        """Adds a step that was just dispatched, and reads the report of an older step.

        The report of the first step of a process is read at once, because the dispatch of the next
        step may wait for a compilation.
        """
        self._pending.append(step)
        is_first = self._last is None
        while len(self._pending) > (0 if is_first else STEPS_IN_FLIGHT):
            self._read_oldest()
        if is_first and step.step % self.context.log_every_n_steps:
            self._log_first(step)

    def drain(self) -> None:
        """Reads all pending reports. This waits for the newest step."""
        while self._pending:
            self._read_oldest()

    def log_step(self) -> None:
        """Writes the metrics and the log line of the newest step. This waits for the step."""
        self.drain()
        assert self._last is not None
        report, context = self._last.report, self.context
        row: Row = {
            "step": self._last.step,
            "loss": float(report.loss),
            "learning_rate": self._last.learning_rate,
            "grad_norm": float(report.grad_norm),
            **{name: float(value) for name, value in report.metrics.items()},
            **asdict(context.throughput.rates()),
            "skipped": self.progress.skipped,
            "dropped": sum(context.datamodule.dropped.values()),
        }
        with context.throughput.measure("saving"):
            context.metrics_log.write(row)
        log.info(format_step(row, context.intervals.last_step))

    def _read_oldest(self) -> None:
        """Reads one report. If the step was skipped, counts it and logs its conversations."""
        done = self._pending.popleft()
        done.report = jax.device_get(done.report)
        self._last = done
        self.context.watchdog.step_ended(done.step)
        self._draw(done)
        progress, report = self.progress, done.report
        if report.applied:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self.has_diverged |= progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW
        reason = "no token to score" if report.count == 0 else "not finite"
        log.warning(
            "step %d skipped (%s: loss %s, gradient norm %s); conversations: %s",
            *(done.step, reason, report.loss, report.grad_norm, ", ".join(done.ids)),
        )

    def _log_first(self, step: DispatchedStep) -> None:
        every = self.context.log_every_n_steps
        total = self.context.intervals.last_step
        log.info(
            "step %d%s  loss %.4f  lr %.3e  first step after (re)start; then a line every %d",
            *(step.step, "" if total is None else f"/{total}"),
            *(float(step.report.loss), step.learning_rate, every),
        )

    def _draw(self, done: DispatchedStep) -> None:
        bar, throughput, last_step = (
            self.context.bar,
            self.context.throughput,
            self.context.intervals.last_step,
        )
        if not bar.is_drawn:
            return
        left = None if last_step is None else last_step - done.step
        text = format_progress(float(done.report.loss), done.learning_rate, throughput.pace(left))
        bar.draw(done.step, text)
