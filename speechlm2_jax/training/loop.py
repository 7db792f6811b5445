"""The training loop on the host: fetches batches, dispatches steps, logs, validates and saves."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jax.sharding import Mesh

from speechlm2_jax.batches import HostBatch, LossSum
from speechlm2_jax.console import phase
from speechlm2_jax.processes import gather_texts
from speechlm2_jax.settings import SettingsError, to_plain
from speechlm2_jax.training.protocol import BatchIterator, JoinsStates
from speechlm2_jax.training.run.metrics_log import Row, format_samples, format_validation
from speechlm2_jax.training.run.run_state import FitResult, RunContext, RunProgress, RunState
from speechlm2_jax.training.run.step_reports import MAX_SKIPPED_IN_A_ROW, DispatchedStep, Reporter
from speechlm2_jax.training.step import MicroSums
from speechlm2_jax.training.validation import Interrupted
from speechlm2_jax.training.validation_shares import own_copies, validation_sets

log = logging.getLogger(__name__)


def _data_state(batches: BatchIterator) -> Any:
    """The state of the batches, the same on all processes, which all must call it."""
    state = batches.get_state()
    if not isinstance(batches, JoinsStates):
        return state
    return batches.joined_state([json.loads(text) for text in gather_texts(json.dumps(state))])


class NonFiniteRun(SystemExit):
    """Twenty steps in a row were skipped. If it is not caught, the process exits with code 1."""


@dataclass
class FitLoop:
    """One call of `fit`: trains from a state until the run ends or is asked to stop."""

    context: RunContext
    state: RunState

    def __post_init__(self) -> None:
        self._reporter = Reporter(self.context, self._progress)
        self._is_stopped = False

    def run(self) -> FitResult:
        """Trains. After too many skipped steps in a row it saves and raises NonFiniteRun."""
        watchdog = self.context.watchdog
        self.context.throughput.on_change = watchdog.changed
        with watchdog.watching():
            reason = self._before_training()
            while reason is None:
                reason = self._train_one_step()
            self._reporter.drain()
            self.context.bar.close()
            self.publish()
            if self._progress.step:
                self._save(final=True)
        if self._reporter.has_diverged:
            log.error("%s", reason)
            raise NonFiniteRun(1)
        log.info("%s", reason)
        return FitResult(
            step=self._progress.step,
            is_finished=not self._is_stopped,
            reason=reason,
            metrics=self.state.val_metrics,
        )

    @property
    def _progress(self) -> RunProgress:
        return self.state.progress

    @property
    def _is_finished(self) -> bool:
        return self.context.intervals.is_finished(self._progress.step, self._progress.batches)

    def publish(self, own: Mesh | None = None) -> None:
        """Gives the model the current arrays. They are valid until the next step donates them.

        With `own` these are the copies that this part of the mesh holds.
        """
        arrays = self.state.train_state
        variables = {**self.state.frozen, **arrays.trainable, **arrays.buffers}
        self.context.model.variables = own_copies(variables, own)

    # ------------------------------------------------------------ steps

    def _before_training(self) -> str | None:
        """Runs the sanity validation of a new run, or a due validation that a stop prevented.

        Returns the reason to end, None to continue.
        """
        progress, stop = self._progress, self.context.stop
        if stop.is_signalled:
            return self._stopped(stop.poll() or "")
        if progress.step == 0 and not self._is_finished:
            return self._validate(sanity=True) if self.context.sanity_batches else None
        if self._is_finished:
            return self._validate_finally() or finished_reason(progress.step)
        before = progress.batches - progress.window
        is_due = self.context.intervals.validates_after(before, progress.batches)
        if is_due and progress.validated_at != progress.step:
            return self._validate_and_save()
        return None

    def _train_one_step(self) -> str | None:
        """Takes one optimizer step, then logs, validates and saves if due.

        Returns the reason to end, None to continue.
        """
        context, progress = self.context, self._progress
        window = self._next_window()
        if not window:
            return self._validate_finally() or f"the training data ended at step {progress.step}"
        context.profiler.before(progress.step + 1)
        self._dispatch(window)
        context.profiler.after(progress.step, self.state.train_state)
        is_last = self._is_finished
        if is_last or progress.step % context.log_every_n_steps == 0:
            self._reporter.log_step()
        if self._reporter.has_diverged:
            return (
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped; stopped at step "
                f"{progress.step}. Check the conversations named above, or lower model.optimizer.lr"
            )
        if (reason := context.stop.poll()) is not None:
            return self._stopped(reason)
        if is_last:
            return self._validate_finally() or f"finished {progress.step} steps"
        if context.intervals.validates_after(progress.batches - len(window), progress.batches):
            return self._validate_and_save()
        if context.checkpoint_params.saves_at_step(progress.step):
            self._save()
        return None

    def _stopped(self, reason: str) -> str:
        self._is_stopped = True
        return f"stopped at step {self._progress.step}: {reason}; the same command resumes the run"

    def _next_window(self) -> list[HostBatch]:
        """Fetches the micro-batches of the next step. The list is empty at the end of the data."""
        window: list[HostBatch] = []
        with self.context.throughput.measure("data_wait"):
            while len(window) < self.context.intervals.window(self._progress.batches):
                batch = next(self.context.batches, None)
                if batch is None:
                    break
                window.append(batch)
        return window

    def _dispatch(self, window: list[HostBatch]) -> None:
        """Dispatches one optimizer step and reads the report of an older step."""
        context, state, progress = self.context, self.state, self._progress
        lr = context.schedule(progress.step)
        for batch in window:
            tokens, padded = context.model.count_tokens(batch)
            # estimates for all processes: this one's groups hold `share` of the global batch
            tokens, flops = round(tokens / batch.share), context.model.flops(batch) / batch.share
            context.throughput.add_batch(tokens=tokens, padded=padded, flops=flops)
        if context.intervals.accumulate == 1:
            state.train_state, report = context.programs.train(
                state.train_state, state.frozen, window[0], lr
            )
        else:
            sums: MicroSums | None = None
            for index, batch in enumerate(window):
                sums = context.programs.accumulate(
                    sums, state.train_state, state.frozen, batch, index
                )
            assert sums is not None
            state.train_state, report = context.programs.finish(state.train_state, sums, lr)
        context.throughput.add_step()
        progress.step += 1
        progress.batches += len(window)
        progress.window = len(window)
        ids = tuple(i for batch in window for i in batch.ids)
        self._reporter.add(DispatchedStep(progress.step, lr, ids, report))

    # ------------------------------------------------------------ validation and saving

    def _validate_finally(self) -> str | None:
        """Runs the last validation, unless it was just done. Returns a reason if interrupted."""
        is_done = self._progress.validated_at == self._progress.step
        return None if is_done else self._validate()

    def _validate_and_save(self) -> str | None:
        """Validates and saves if due. Returns a reason to end if interrupted."""
        if (reason := self._validate()) is not None:
            return reason
        context, step = self.context, self._progress.step
        epoch = context.intervals.epoch(self._progress.batches - 1)
        params = context.checkpoint_params
        if params.saves_after_validation(epoch) or params.saves_at_step(step):
            self._save()
        return None

    def _validate(self, *, sanity: bool = False) -> str | None:
        """Validates with the current weights. Returns a reason to end if interrupted."""
        context = self.context
        if context.validator is None:
            return None
        self._reporter.drain()
        self.publish(context.own_mesh)
        try:
            with context.throughput.measure("validation"), phase("validation"):
                sets = validation_sets(context.datamodule, context.own_mesh)
                limit = context.sanity_batches if sanity else None
                result = context.validator.run(sets, self._evaluate, limit)
        except Interrupted:
            return self._stopped(context.stop.poll() or "validation was interrupted")
        self.publish()  # frees what the model made of its arrays to generate from them
        self._check_monitor(result.metrics)
        if sanity:
            log.info("sanity validation passed; training starts")
            return None
        self.state.val_metrics = result.metrics
        self._progress.validated_at = self._progress.step
        row: Row = {"step": self._progress.step, **result.metrics}
        context.metrics_log.write(row)
        context.metrics_log.write_samples(self._progress.step, result.samples)
        for line in (*format_samples(self._progress.step, result.samples), format_validation(row)):
            log.info("%s", line)
        return None

    def _evaluate(self, batch: HostBatch) -> Mapping[str, LossSum]:
        return self.context.programs.evaluate(self.state.train_state, self.state.frozen, batch)

    def _check_monitor(self, metrics: Mapping[str, float]) -> None:
        """Raises SettingsError if the monitored metric is not among the validation metrics."""
        params = self.context.checkpoint_params
        wanted = params.monitor if self.context.checkpointer and params.save_top_k > 0 else None
        if wanted is not None and metrics and wanted not in metrics:
            raise SettingsError(
                f"exp_manager.checkpoint_callback_params.monitor: {wanted} is not a validation "
                f"metric; choose one of {', '.join(metrics)}"
            )

    def _save(self, *, final: bool = False) -> None:
        """Starts saving the current step, unless it is saved already.

        With `final` it waits until the checkpoint is written.
        """
        context, progress = self.context, self._progress
        if context.checkpointer is None:
            return
        with context.throughput.measure("saving"):
            self._reporter.drain()
            if self.state.val_metrics and progress.validated_at == progress.step:
                context.checkpointer.rank(progress.step, self.state.val_metrics)
            if progress.step != context.checkpointer.latest_step:
                progress.data = _data_state(context.batches)
                state = self.state.train_state
                counters = {"step": state.step, "skipped": state.skipped}
                arrays = {
                    "params": state.trainable,
                    "buffers": state.buffers,
                    "opt": {"state": state.opt_state, **counters},
                }
                context.checkpointer.save(
                    progress.step,
                    arrays,
                    progress=asdict(progress),
                    settings=to_plain(context.model.settings),
                )
                log.info("saving checkpoint of step %d", progress.step)
            if final:
                with phase("writing the last checkpoint"):
                    context.checkpointer.wait()


def finished_reason(step: int) -> str:
    """The message of a run that has reached its last step."""
    return (
        f"this run is finished: {step} steps are done; to extend it, raise "
        "trainer.max_steps (and model.lr_scheduler.max_steps, if the schedule should be longer too)"
    )
