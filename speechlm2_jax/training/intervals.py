"""When a run validates and ends, counted in micro-batches and steps as Lightning counts.

An epoch is `limit_train_batches` micro-batches. An optimizer step takes `accumulate` micro-batches,
fewer at the end of an epoch. A validation that is due at a micro-batch runs after the optimizer
step that contains it. So every checkpoint lies between two steps.
"""

from dataclasses import dataclass

from speechlm2_jax.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When a run validates and ends.

    It depends only on counts of steps and micro-batches, so a resumed run keeps the same schedule.
    """

    max_steps: int | None
    max_epochs: int | None
    accumulate: int
    epoch_batches: int | None
    """Micro-batches of an epoch; None: one endless epoch."""
    validate_every: int | None
    """Micro-batches between validations; None: only at the end of the run."""
    across_epochs: bool
    """True: `validate_every` is counted from the start of the run, not of each epoch."""
    every_n_epochs: int = 1
    """Validate only in every n-th epoch."""

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps of an epoch; None: one endless epoch."""
        return None if self.epoch_batches is None else -(-self.epoch_batches // self.accumulate)

    @property
    def last_step(self) -> int | None:
        """The step at which the run is finished; None: only a time limit ends the run."""
        ends = [] if self.max_steps is None else [self.max_steps]
        if self.max_epochs is not None and self.epoch_steps is not None:
            ends.append(self.max_epochs * self.epoch_steps)
        return min(ends, default=None)

    def window(self, batches: int) -> int:
        """How many micro-batches the next step takes once `batches` were taken before."""
        if self.epoch_batches is None:
            return self.accumulate
        return min(self.accumulate, self.epoch_batches - batches % self.epoch_batches)

    def epoch(self, batch: int) -> int:
        """The epoch of micro-batch `batch`; both are counted from 0."""
        return 0 if self.epoch_batches is None else batch // self.epoch_batches

    def validates_after(self, before: int, batches: int) -> bool:
        """True if a validation is due at one of the micro-batches `before` to `batches` - 1."""
        return any(self._validates_at(batch) for batch in range(before, batches))

    def _validates_at(self, batch: int) -> bool:
        if self.validate_every is None:
            return False
        if not self.across_epochs and (self.epoch(batch) + 1) % self.every_n_epochs:
            return False
        endless = self.across_epochs or self.epoch_batches is None
        position = batch if endless else batch % (self.epoch_batches or 1)
        return (position + 1) % self.validate_every == 0

    def is_finished(self, step: int, batches: int) -> bool:
        """True once `max_steps` or `max_epochs` is reached."""
        if self.max_steps is not None and step >= self.max_steps:
            return True
        return (
            self.max_epochs is not None
            and self.epoch_batches is not None
            and batches >= self.max_epochs * self.epoch_batches
        )


def resolve_validation_interval(
    interval: int | float | None, epoch_batches: int | None, *, across_epochs: bool
) -> int | None:
    """Converts `val_check_interval` to micro-batches between validations.

    A float is a fraction of an epoch. Raises SettingsError if the interval is longer than an epoch,
    or a fraction of an endless epoch.
    """
    key = "trainer.val_check_interval"
    if isinstance(interval, int):
        if interval < 1:
            raise SettingsError(f"{key}={interval} must be at least 1 micro-batch")
        if not across_epochs and epoch_batches is not None and interval > epoch_batches:
            raise SettingsError(
                f"{key}={interval} is longer than an epoch of trainer.limit_train_batches="
                f"{epoch_batches}; shorten it, or set trainer.check_val_every_n_epoch=null"
            )
        return interval
    part = 1.0 if interval is None else interval
    if not 0 < part <= 1:
        raise SettingsError(f"{key}={part} must be an integer, or a fraction of an epoch in (0, 1]")
    if epoch_batches is None:
        if part == 1:
            return None
        raise SettingsError(
            f"{key}={part} is a fraction of an epoch, but training data is endless; give an "
            "integer of micro-batches, or an integer trainer.limit_train_batches"
        )
    return max(1, int(epoch_batches * part))
