"""The loop over steps, on the host: fetch, dispatch, and once in a while log, validate, save."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from speechlm2_jax.batches import HostBatch, LossSum
from speechlm2_jax.console import phase
from speechlm2_jax.settings import SettingsError, to_plain
from speechlm2_jax.training.protocol import Variables
from speechlm2_jax.training.run.metrics_log import Row, format_samples, format_validation
from speechlm2_jax.training.run.run_state import FitResult, Progress, RunContext
from speechlm2_jax.training.run.step_reports import MAX_SKIPPED_IN_A_ROW, Reporter, Taken
from speechlm2_jax.training.state import TrainState
from speechlm2_jax.training.step import MicroSums
from speechlm2_jax.training.validation import Interrupted

log = logging.getLogger(__name__)


class NonFiniteRun(SystemExit):
    """Twenty steps in a row were not finite; uncaught, the process ends with exit code 1."""


@dataclass
class FitLoop:
    """One run of `fit`, from a state to its end or to a request to stop."""

    parts: RunContext
    state: TrainState
    frozen: Variables
    progress: Progress
    _metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reporter = Reporter(self.parts, self.progress)

    def run(self) -> FitResult:
        """Trains. Raises NonFiniteRun after too many skipped steps, having saved."""
        first_step = self.progress.step
        reason = self._before_training()
        while reason is None:
            reason = self._train_one_step()
        self._reporter.drain()
        self.parts.bar.close()
        self.publish()
        if self.progress.step:
            self._save(final=True)
        if self.progress.step > first_step:
            self._reporter.log_times()
        if self._reporter.is_hopeless:
            log.error("%s", reason)
            raise NonFiniteRun(1)
        log.info("%s", reason)
        return FitResult(
            step=self.progress.step,
            is_finished=self._is_finished,
            reason=reason,
            metrics=self._metrics,
        )

    @property
    def _is_finished(self) -> bool:
        return self.parts.cadence.is_finished(self.progress.step, self.progress.batches)

    def publish(self) -> None:
        """Lets the model hold the current arrays (until the next step donates them)."""
        state = self.state
        self.parts.model.variables = {**self.frozen, **state.trainable, **state.buffers}

    # ------------------------------------------------------------ steps

    def _before_training(self) -> str | None:
        """Looks at validation before a new run; makes up for what a stop left undone."""
        progress, stop = self.progress, self.parts.stop
        if stop.is_signalled:
            return self._stopped(stop.ask() or "")
        if progress.step == 0 and not self._is_finished:
            return self._validate(sanity=True) if self.parts.sanity_batches else None
        if self._is_finished:
            return self._validate_finally() or finished_reason(progress.step)
        before = progress.batches - progress.window
        is_due = self.parts.cadence.validates_after(before, progress.batches)
        if is_due and progress.validated_at != progress.step:
            return self._validate_and_save()
        return None

    def _train_one_step(self) -> str | None:
        """Takes one optimizer step and does what falls due after it. Returns why to end."""
        parts, progress = self.parts, self.progress
        window = self._next_window()
        if not window:
            return self._validate_finally() or f"the training data ended at step {progress.step}"
        parts.profiler.before(progress.step + 1)
        self._dispatch(window)
        parts.profiler.after(progress.step, self.state)
        is_last = self._is_finished
        if is_last or progress.step % parts.log_every_n_steps == 0:
            self._reporter.log_step()
        if self._reporter.is_hopeless:
            return (
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped; stopped at step "
                f"{progress.step}. Look at the conversations above, or lower model.optimizer.lr"
            )
        if (reason := parts.stop.ask()) is not None:
            return self._stopped(reason)
        if is_last:
            return self._validate_finally() or f"finished {progress.step} steps"
        if parts.cadence.validates_after(progress.batches - len(window), progress.batches):
            return self._validate_and_save()
        if parts.checkpoint_params.saves_at_step(progress.step):
            self._save()
        return None

    def _stopped(self, reason: str) -> str:
        return f"stopped at step {self.progress.step}: {reason}; the same command resumes the run"

    def _next_window(self) -> list[HostBatch]:
        """The micro-batches of the next step; empty where the data ends."""
        window: list[HostBatch] = []
        with self.parts.meter.measure("data_wait"):
            while len(window) < self.parts.cadence.window(self.progress.batches):
                batch = next(self.parts.batches, None)
                if batch is None:
                    break
                window.append(batch)
        return window

    def _dispatch(self, window: list[HostBatch]) -> None:
        """Starts one optimizer step, and reads the report of an older one."""
        parts, progress = self.parts, self.progress
        lr = parts.schedule(progress.step)
        for batch in window:
            tokens, padded = parts.model.count_tokens(batch)
            # other processes' groups hold about as much
            tokens, flops = round(tokens / batch.share), parts.model.flops(batch) / batch.share
            parts.meter.add_batch(tokens=tokens, padded=padded, flops=flops)
        if parts.cadence.accumulate == 1:
            self.state, report = parts.programs.train(self.state, self.frozen, window[0], lr)
        else:
            sums: MicroSums | None = None
            for index, batch in enumerate(window):
                sums = parts.programs.accumulate(sums, self.state, self.frozen, batch, index)
            assert sums is not None
            self.state, report = parts.programs.finish(self.state, sums, lr)
        parts.meter.add_step()
        progress.step += 1
        progress.batches += len(window)
        progress.window = len(window)
        ids = tuple(i for batch in window for i in batch.ids)
        self._reporter.add(Taken(progress.step, lr, ids, report))

    # ------------------------------------------------------------ validation and saving

    def _validate_finally(self) -> str | None:
        """The last validation, unless it was just done. Returns why to end if interrupted."""
        is_done = self.progress.validated_at == self.progress.step
        return None if is_done else self._validate()

    def _validate_and_save(self) -> str | None:
        """A validation on the way, and what follows it. Returns why to end if interrupted."""
        if (reason := self._validate()) is not None:
            return reason
        parts, step = self.parts, self.progress.step
        epoch = parts.cadence.epoch(self.progress.batches - 1)
        params = parts.checkpoint_params
        if params.saves_after_validation(epoch) or params.saves_at_step(step):
            self._save()
        return None

    def _validate(self, *, sanity: bool = False) -> str | None:
        """Validates with the current weights. Returns why to end if it was interrupted."""
        parts = self.parts
        if parts.validator is None:
            return None
        self._reporter.drain()
        self.publish()
        try:
            with parts.meter.measure("validation"), phase("validation"):
                sets = parts.datamodule.validation_batches()
                limit = parts.sanity_batches if sanity else None
                result = parts.validator.run(sets, self._evaluate, limit)
        except Interrupted:
            return self._stopped(parts.stop.ask() or "validation was interrupted")
        self._check_monitor(result.metrics)
        if sanity:
            log.info("validation works; training begins")
            return None
        self._metrics = result.metrics
        self.progress.validated_at = self.progress.step
        row: Row = {"step": self.progress.step, **result.metrics}
        parts.metrics_log.write(row)
        parts.metrics_log.write_samples(self.progress.step, result.samples)
        for line in (*format_samples(self.progress.step, result.samples), format_validation(row)):
            log.info("%s", line)
        return None

    def _evaluate(self, batch: HostBatch) -> Mapping[str, LossSum]:
        return self.parts.programs.evaluate(self.state, self.frozen, batch)

    def _check_monitor(self, metrics: Mapping[str, float]) -> None:
        """Raises SettingsError if the best checkpoint is to be chosen by a metric not there."""
        params = self.parts.checkpoint_params
        wanted = params.monitor if self.parts.checkpointer and params.save_top_k > 0 else None
        if wanted is not None and metrics and wanted not in metrics:
            raise SettingsError(
                f"exp_manager.checkpoint_callback_params.monitor={wanted} is no validation metric; "
                f"choose one of {', '.join(metrics)}"
            )

    def _save(self, *, final: bool = False) -> None:
        """Starts a checkpoint of the current step, unless it has one; the final one is awaited."""
        parts, progress, state = self.parts, self.progress, self.state
        if parts.checkpointer is None:
            return
        with parts.meter.measure("saving"):
            self._reporter.drain()
            if self._metrics and progress.validated_at == progress.step:
                parts.checkpointer.rank(progress.step, self._metrics)
            if progress.step != parts.checkpointer.latest_step:
                progress.data = parts.batches.get_state()
                counters = {"step": state.step, "skipped": state.skipped}
                arrays = {
                    "params": state.trainable,
                    "buffers": state.buffers,
                    "opt": {"state": state.opt_state, **counters},
                }
                parts.checkpointer.save(
                    progress.step,
                    arrays,
                    progress=asdict(progress),
                    settings=to_plain(parts.model.settings),
                )
                log.info("saving checkpoint of step %d", progress.step)
            if final:
                with phase("writing the last checkpoint"):
                    parts.checkpointer.wait()


def finished_reason(step: int) -> str:
    """What is said of a run that has nothing left to do."""
    return (
        f"this run is finished: {step} steps are done; to extend it, raise "
        "trainer.max_steps (and model.lr_scheduler.max_steps, if the rate should follow)"
    )
