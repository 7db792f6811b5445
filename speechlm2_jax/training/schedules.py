"""NeMo's learning-rate schedules (nemo/core/optim/lr_scheduler.py) as functions of the step.

Each is a frozen dataclass with NeMo's keys. `at(step, base_lr)` is the learning rate of optimizer
step `step`, counted from 0. The host computes it in double precision. The phases are warm-up, then
the policy's own curve, then `min_lr` after `max_steps`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from speechlm2_jax.settings import Refusal, SettingsError
from speechlm2_jax.settings.targets import select

Schedule = Callable[[int], float]
"""Optimizer step from 0 -> learning rate."""


@dataclass(frozen=True, kw_only=True)
class WarmupPolicy:
    """Linear warm-up, then a constant rate; the base of the policies below."""

    max_steps: int | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    """Warm-up as a fraction of `max_steps`."""
    min_lr: float = 0.0

    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "last_epoch": (
            "a resumed run takes the step of its schedule from its checkpoint; leave it -1",
            -1,
        ),
    }
    IGNORED: ClassVar[Mapping[str, str]] = {
        "monitor": "only ReduceLROnPlateau reads it",
        "reduce_on_plateau": "only ReduceLROnPlateau reads it",
    }
    needs_max_steps: ClassVar[bool] = True
    decays_to_min_lr: ClassVar[bool] = False
    """True where NeMo refuses a `min_lr` above the base rate."""

    def __post_init__(self) -> None:
        if self.needs_max_steps and self.max_steps is None:
            raise ValueError("max_steps is required; max_steps: ${trainer.max_steps} is usual")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1")
        self._steps_of("warmup")

    @property
    def warmup(self) -> int:
        """Steps of the warm-up phase."""
        return self._steps_of("warmup")

    @property
    def end(self) -> int:
        """The step after which the rate is `min_lr`."""
        return self.max_steps or 0

    def at(self, step: int, base_lr: float) -> float:
        """The learning rate of optimizer step `step`, from 0."""
        if 0 < self.warmup >= step:
            return self._warming(step, base_lr)
        if self.max_steps is not None and step > self.max_steps:
            return self.min_lr
        return self._curve(step, base_lr)

    def _warming(self, step: int, base_lr: float) -> float:
        return base_lr * (step + 1) / (self.warmup + 1)

    def _curve(self, step: int, base_lr: float) -> float:
        return base_lr

    def _fraction(self, step: int, start: int) -> float:
        """The fraction of the steps from `start` to the end that is done."""
        return (step - start) / (self.end - start)

    def _steps_of(self, phase: str) -> int:
        """The length of a phase given in steps or as a ratio of `max_steps`."""
        steps, ratio = getattr(self, f"{phase}_steps"), getattr(self, f"{phase}_ratio")
        if steps is not None and ratio is not None:
            raise ValueError(f"give {phase}_steps or {phase}_ratio, not both")
        if ratio is None:
            return steps or 0
        if self.max_steps is None:
            raise ValueError(f"{phase}_ratio needs max_steps")
        return int(ratio * self.max_steps)


@dataclass(frozen=True, kw_only=True)
class ConstantWarmup(WarmupPolicy):
    """WarmupPolicy under its own name: `max_steps` may be left out."""

    needs_max_steps: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class CosineAnnealing(WarmupPolicy):
    """Half a cosine from the base rate to `min_lr`.

    With `constant_steps` it follows Megatron: the warm-up starts from 0, and the rate of the last
    `constant_steps` is `min_lr`.
    """

    constant_steps: int | None = None
    constant_ratio: float | None = None
    decays_to_min_lr: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup + self.constant > self.end:
            raise ValueError(
                f"{self.warmup} warm-up and {self.constant} constant steps exceed max_steps="
                f"{self.end}; set model.lr_scheduler.warmup_steps lower or trainer.max_steps higher"
            )

    @property
    def constant(self) -> int:
        """Steps at the end that stay at `min_lr`."""
        return self._steps_of("constant")

    def _warming(self, step: int, base_lr: float) -> float:
        if self.constant:
            return base_lr * step / self.warmup
        return super()._warming(step, base_lr)

    def _curve(self, step: int, base_lr: float) -> float:
        decay = self.end - self.warmup - self.constant
        if step > self.warmup + decay:
            return self.min_lr
        wave = 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / decay))
        return (base_lr - self.min_lr) * wave + self.min_lr


@dataclass(frozen=True, kw_only=True)
class InverseSquareRootAnnealing(WarmupPolicy):
    """base_lr / sqrt((step + 1) / (warmup + 1))."""

    def _curve(self, step: int, base_lr: float) -> float:
        return base_lr / ((step + 1) / (self.warmup + 1)) ** 0.5


@dataclass(frozen=True, kw_only=True)
class NoamAnnealing(WarmupPolicy):
    """base_lr / sqrt(d_model) * min(step^-0.5, step * warmup^-1.5) (Vaswani et al. 2017)."""

    d_model: int
    needs_max_steps: ClassVar[bool] = False
    decays_to_min_lr: ClassVar[bool] = True

    def at(self, step: int, base_lr: float) -> float:
        """The learning rate of optimizer step `step`; it goes on falling after `max_steps`."""
        step = max(1, step)
        factor = step**-0.5
        if self.warmup > 0:
            factor = min(factor, step * self.warmup**-1.5)
        rate = base_lr * self.d_model**-0.5 * factor
        return max(rate, self.min_lr) if step > self.warmup else rate


@dataclass(frozen=True, kw_only=True)
class WarmupAnnealing(WarmupPolicy):
    """A straight line from the base rate to `min_lr`."""

    def _curve(self, step: int, base_lr: float) -> float:
        return self.min_lr + (1 - self._fraction(step, self.warmup)) * (base_lr - self.min_lr)


@dataclass(frozen=True, kw_only=True)
class SquareAnnealing(WarmupPolicy):
    """The base rate times (fraction of steps after warm-up that are left)^2, at least `min_lr`."""

    min_lr: float = 1e-5

    def _curve(self, step: int, base_lr: float) -> float:
        return max(base_lr * (1 - self._fraction(step, self.warmup)) ** 2, self.min_lr)


@dataclass(frozen=True, kw_only=True)
class SquareRootAnnealing(WarmupPolicy):
    """The base rate times sqrt(fraction of all steps that are left), at least `min_lr`."""

    def _curve(self, step: int, base_lr: float) -> float:
        return max(base_lr * (1 - self._fraction(step, 0)) ** 0.5, self.min_lr)


@dataclass(frozen=True, kw_only=True)
class PolynomialDecayAnnealing(WarmupPolicy):
    """A polynomial from the base rate to `min_lr`.

    With `cycle` it is stretched to 2, 3, ... times its length once it has reached `min_lr`.
    """

    power: float = 1.0
    cycle: bool = False

    @property
    def start(self) -> int:
        """The step at which the decay begins."""
        return self.warmup

    def _curve(self, step: int, base_lr: float) -> float:
        done, length = step - self.start, self.end - self.start
        if self.cycle:
            length *= max(1, math.ceil(done / length))
        left = (1 - min(done, length) / length) ** self.power
        return (base_lr - self.min_lr) * left + self.min_lr


@dataclass(frozen=True, kw_only=True)
class WarmupHoldPolicy(WarmupPolicy):
    """Warm-up, then the base rate for `hold_steps` more, then the policy's own curve."""

    hold_steps: int | None = None
    hold_ratio: float | None = None

    @property
    def held(self) -> int:
        """The step at which the decay begins, or 0 if nothing is held."""
        if self.hold_steps is None and self.hold_ratio is None:
            return 0
        return self._steps_of("hold") + self.warmup

    def at(self, step: int, base_lr: float) -> float:
        """The learning rate of optimizer step `step`, from 0."""
        if self.warmup <= step < self.held and not 0 < self.warmup >= step:
            return base_lr
        return super().at(step, base_lr)


@dataclass(frozen=True, kw_only=True)
class WarmupHoldAnnealLinear(WarmupHoldPolicy):
    """After the hold, a straight line to `min_lr` (MiniCPM, arXiv 2404.06395)."""

    def _curve(self, step: int, base_lr: float) -> float:
        return base_lr - (base_lr - self.min_lr) * self._fraction(step, self.held)


@dataclass(frozen=True, kw_only=True)
class WarmupHoldAnnealOneMinusSquareRoot(WarmupHoldPolicy):
    """After the hold, the base rate times 1 - sqrt(fraction done) (arXiv 2408.11029)."""

    def _curve(self, step: int, base_lr: float) -> float:
        return max(self.min_lr, base_lr * (1 - self._fraction(step, self.held) ** 0.5))


@dataclass(frozen=True, kw_only=True)
class NoamHoldAnnealing(WarmupHoldPolicy):
    """After the hold, base_lr * (warmup / (step - hold))^decay_rate (arXiv 2206.00888)."""

    decay_rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.warmup:
            raise ValueError("NoamHoldAnnealing needs warmup_steps or warmup_ratio above 0")

    def _curve(self, step: int, base_lr: float) -> float:
        hold = self.held - self.warmup if self.held else 0
        peak, now = max(1, self.warmup**self.decay_rate), max(1, (step - hold) ** self.decay_rate)
        return max(base_lr * peak / now, self.min_lr)


@dataclass(frozen=True, kw_only=True)
class PolynomialHoldDecayAnnealing(WarmupHoldPolicy):
    """After the hold, a polynomial to `min_lr`."""

    power: float = 1.0
    cycle: bool = False

    def _curve(self, step: int, base_lr: float) -> float:
        done, length = step - self.held, self.end - max(self.warmup, self.held)
        if self.cycle:
            length *= max(1, math.ceil(done / length))
        left = (1 - min(done, length) / length) ** self.power
        return (base_lr - self.min_lr) * left + self.min_lr


SCHEDULES: Mapping[str, type[WarmupPolicy]] = {
    "WarmupPolicy": ConstantWarmup,
    "CosineAnnealing": CosineAnnealing,
    "InverseSquareRootAnnealing": InverseSquareRootAnnealing,
    "NoamAnnealing": NoamAnnealing,
    "NoamHoldAnnealing": NoamHoldAnnealing,
    "PolynomialDecayAnnealing": PolynomialDecayAnnealing,
    "PolynomialHoldDecayAnnealing": PolynomialHoldDecayAnnealing,
    "SquareAnnealing": SquareAnnealing,
    "SquareRootAnnealing": SquareRootAnnealing,
    "WarmupAnnealing": WarmupAnnealing,
    "WarmupHoldPolicy": WarmupHoldPolicy,
    "WarmupHoldAnnealLinear": WarmupHoldAnnealLinear,
    "WarmupHoldAnnealOneMinusSquareRoot": WarmupHoldAnnealOneMinusSquareRoot,
}


def make_schedule(values: Mapping[str, object] | None, base_lr: float) -> Schedule:
    """Reads NeMo's `lr_scheduler` block; without one the rate is constant.

    Raises SettingsError for an unknown schedule or key, or a `min_lr` above the base rate.
    """
    if not values:
        return lambda step: base_lr
    policy = select(SCHEDULES, values, "model.lr_scheduler")
    if policy.decays_to_min_lr and base_lr < policy.min_lr:
        raise SettingsError(
            f"model.lr_scheduler.min_lr={policy.min_lr} is above model.optimizer.lr={base_lr}"
        )
    return lambda step: policy.at(step, base_lr)
