"""Which set gives the next batch, where several are fused; and its plan.

An epoch of finite sets ends with the last of them (joined: with the first), and the next one begins
anew with all. Of sets that NeMo repeats without end no epoch ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from speechlm2_jax.data.fusion import RANDOM, ZIP, FusionConfig
from speechlm2_jax.data.pipeline import Plans
from speechlm2_jax.data.sampler import BatchPlan
from speechlm2_jax.settings import SettingsError

_PURPOSE = 3000
"""With the seed, tells these draws from those of plans, augmentation and replacements."""


class SetBatch(NamedTuple):
    """The next batch of one set."""

    name: str
    plan: BatchPlan
    place: tuple[int, int]
    """Its epoch and its number in it, counted from 1."""


Fused = tuple[SetBatch, ...]
"""The parts of a batch: one, or one of each set."""


class FusedPlans(Iterator[Fused]):
    """The plans of several sets, fused. Its state is theirs, and its position.

    Args:
        parts: the plans of each set, without end.
        config: how they are fused.
        seed: of the draws.
        is_endless: whether no epoch ends.
    """

    def __init__(
        self, parts: Mapping[str, Plans], config: FusionConfig, seed: int, *, is_endless: bool
    ) -> None:
        self._parts, self._config, self._seed = dict(parts), config, seed
        self._is_endless = is_endless
        self._begin(0)

    def __next__(self) -> Fused:
        while True:
            fused = self._joined() if self._config.sampler_fusion == ZIP else self._of_one()
            if fused is not None:
                self._position += 1
                return fused
            if not self._position:
                raise SettingsError("an epoch of the fused sets has no batches")
            for part in self._parts.values():
                part.set_state({"epoch": self._epoch + 1, "position": 0})
            self._begin(self._epoch + 1)

    def get_state(self) -> dict[str, Any]:
        """Epoch and batches given of it, the set whose turn is next, and the states of all."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "turn": self._turn,
            "finished": sorted(self._finished),
            "parts": {name: part.get_state() for name, part in self._parts.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from a state of `get_state`. Raises SettingsError for one of other sets."""
        if sorted(state.get("parts", ())) != sorted(self._parts):
            raise SettingsError(
                f"the data state has the sets {sorted(state.get('parts', ()))}, this run "
                f"{sorted(self._parts)}"
            )
        self._begin(int(state["epoch"]))
        self._position, self._turn = int(state["position"]), int(state["turn"])
        self._finished = set(state["finished"])
        for name, part in self._parts.items():
            part.set_state(dict(state["parts"][name]))

    def _begin(self, epoch: int) -> None:
        self._epoch, self._position, self._turn = epoch, 0, 0
        self._finished: set[str] = set()

    def _joined(self) -> Fused | None:
        parts = [self._take(name) for name in self._parts]
        return None if None in parts else tuple(part for part in parts if part is not None)

    def _of_one(self) -> Fused | None:
        """The batch of the set whose turn it is; None if all are through."""
        while len(self._finished) < len(self._parts):
            left = [name for name in self._parts if name not in self._finished]
            name = left[self._turn]
            part = self._take(name)
            if part is None:
                self._finished.add(name)
                left.remove(name)
            self._turn = self._after(self._turn, left)
            if part is not None:
                return (part,)
        return None

    def _after(self, turn: int, left: Sequence[str]) -> int:
        """The place, among the sets that are left, of the one whose turn is next."""
        if self._config.sampler_fusion != RANDOM or len(left) < 2:
            return (turn + 1) % max(len(left), 1)
        weights = self._config.sampler_weights or dict.fromkeys(left, 1.0)
        parts = np.asarray([weights[name] for name in left])
        place = self._position + len(self._finished)
        draws = np.random.default_rng([self._seed, _PURPOSE, self._epoch, place])
        return int(draws.choice(len(left), p=parts / parts.sum()))

    def _take(self, name: str) -> SetBatch | None:
        """The next batch of a set; None if its next one belongs to the next epoch."""
        part = self._parts[name]
        before = part.get_state()
        plan = next(part)
        state = part.get_state()
        epoch = int(state["epoch"])
        if not self._is_endless and epoch > self._epoch:
            part.set_state(before)
            return None
        return SetBatch(name, plan, (epoch, int(state["position"])))
