"""The batch plans of a large data set, of all epochs in order."""

from collections.abc import Iterator
from typing import Any

from speechlm2_jax.data.index.windows import Carried, WindowPlan, WindowSampler
from speechlm2_jax.data.sampler import BatchPlan
from speechlm2_jax.settings import SettingsError


class PlannedWindows(Iterator[BatchPlan]):
    """Plans window after window; its state is the position in one, and what was left to it.

    A state is a few small numbers, so resuming plans the window again, and of the one before it
    the order.
    """

    def __init__(self, sampler: WindowSampler, epochs: int | None = None) -> None:
        self._sampler, self._epochs = sampler, epochs
        self._epoch = self._window = 0
        self._position = self._before = 0
        """Batches of the epoch that were given, and those of them in earlier windows."""
        self._carried: Carried | None = sampler.nothing
        self._left = self._carried.left()
        self._plan: WindowPlan | None = None
        self._rows_of_epoch = 0

    def __next__(self) -> BatchPlan:
        while self._epochs is None or self._epoch < self._epochs:
            plan = self._planned()
            if self._position - self._before < len(plan):
                self._position += 1
                return plan[self._position - self._before - 1]
            self._advance(plan)
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        """The place: epoch, batches given of it, window, batches of the windows before it.

        `left` is what the window before left to this one.
        """
        left = {"left": self._left} if any(self._left) else {}
        return {
            "epoch": self._epoch,
            "position": self._position,
            "window": self._window,
            "before": self._before,
            **left,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from a state of `get_state`."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._window = min(int(state.get("window", 0)), self._sampler.order.windows - 1)
        self._before = int(state.get("before", 0))
        nothing = self._sampler.nothing.left()
        left = state.get("left", nothing) if "window" in state else nothing
        self._left = left if len(left) == len(nothing) else nothing  # of other buckets
        self._plan = self._carried = None
        self._rows_of_epoch = self._position

    def _planned(self) -> WindowPlan:
        if self._carried is None:
            self._carried = self._sampler.carried(self._left, self._epoch, self._window)
        if self._plan is None:
            self._plan = self._sampler.window(self._epoch, self._window, self._carried)
            self._rows_of_epoch += len(self._plan.rows)
        return self._plan

    def _advance(self, plan: WindowPlan) -> None:
        """Goes to the next window. Raises SettingsError if an epoch has no batch at all."""
        self._plan, self._carried, self._left = None, plan.carried, plan.carried.left()
        self._window, self._before = self._window + 1, self._position
        if self._window < self._sampler.order.windows:
            return
        if not self._rows_of_epoch and not any(map(len, plan.carried.rows)):
            raise SettingsError("an epoch has no batches: fewer conversations than a batch")
        self._epoch, self._window, self._rows_of_epoch = self._epoch + 1, 0, 0
        self._position = self._before = 0
