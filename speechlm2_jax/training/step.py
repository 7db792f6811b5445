"""One training step and one validation step, as pure functions.

The backward pass differentiates the loss summed over tokens. Gradients and counts are added over
micro-batches. The gradient is then divided once by the count. So every token has the same weight,
even if micro-batches differ in size. `nemo_exact` averages the means of micro-batches instead, as
NeMo does. If the loss or the gradient norm is not finite, the step is skipped: parameters and
optimizer state stay unchanged, and only the counters advance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from speechlm2_jax.arrays import AnyArray, Scalar
from speechlm2_jax.batches import LossSum, StepLosses
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import Sharding, use
from speechlm2_jax.training.optimizer import Optimizer
from speechlm2_jax.training.protocol import Variables
from speechlm2_jax.training.state import TrainState

T = TypeVar("T")
Losses = Callable[..., StepLosses]
"""`TrainableModel.losses`: (variables, batch, *, key, train) -> StepLosses."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class MicroSums:
    """Gradients and losses summed over micro-batches, and the buffers after the last of them."""

    grads: Variables
    loss: LossSum
    metrics: dict[str, LossSum]
    buffers: Variables


@register_pytree
@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Scalars of a step, replicated over devices. The host reads them some steps later."""

    loss: Scalar
    grad_norm: Scalar
    """The global gradient norm before clipping."""
    count: Scalar
    """Scored elements; 0 if the batch holds no target."""
    applied: AnyArray | np.bool_ | bool
    """Bool: False if the step was skipped."""
    metrics: dict[str, Scalar]
    """Means over all micro-batches of the step, by name."""


@dataclass(frozen=True, kw_only=True)
class StepFunctions:
    """The pure functions of training. All fields are static, so each function can be jitted."""

    losses: Losses
    optimizer: Optimizer
    sharding: Sharding
    seed: int
    accumulate: int = 1
    """Micro-batches of a full step."""
    nemo_exact: bool = False
    derive: Callable[..., PyTree] | None = None
    """`CompletesBatches.derive` of the model; None if it completes no batches."""

    def train(
        self, state: TrainState, frozen: Variables, batch: PyTree, lr: Scalar
    ) -> tuple[TrainState, StepReport]:
        """Takes one step on one batch: forward, backward, clipping, update."""
        return self.finish(state, self.micro(state, state.buffers, frozen, batch, 0), lr)

    def start(self, shapes: MicroSums, buffers: Variables) -> MicroSums:
        """Makes the sums before the first micro-batch: zeros, and a copy of the buffers."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return replace(zeros, buffers=jax.tree.map(jnp.copy, buffers))

    def add(
        self,
        sums: MicroSums,
        state: TrainState,
        frozen: Variables,
        batch: PyTree,
        index: Scalar,
    ) -> MicroSums:
        """Adds micro-batch `index` of the step. It starts from the buffers of the one before."""
        more = self.micro(state, sums.buffers, frozen, batch, index)
        total = jax.tree.map(
            jnp.add, (sums.grads, sums.loss, sums.metrics), (more.grads, more.loss, more.metrics)
        )
        return MicroSums(grads=total[0], loss=total[1], metrics=total[2], buffers=more.buffers)

    def finish(
        self, state: TrainState, sums: MicroSums, lr: Scalar
    ) -> tuple[TrainState, StepReport]:
        """Divides the sums by the count and updates the parameters.

        Keeps the old values if the loss or the gradient norm is not finite, or the count is 0.
        """
        count = sums.loss.count
        divisor = float(self.accumulate) if self.nemo_exact else jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / divisor, sums.grads)
        update = self.optimizer.update(grads, state.opt_state, state.trainable, lr)
        applied = jnp.isfinite(sums.loss.total) & jnp.isfinite(update.grad_norm) & (count > 0)

        def choose(new: T, old: T) -> T:
            return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)

        new_state = TrainState(
            trainable=choose(update.params, state.trainable),
            buffers=choose(sums.buffers, state.buffers),
            opt_state=choose(update.opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + jnp.where(applied, 0, 1),
        )
        report = StepReport(
            loss=sums.loss.mean(),
            grad_norm=update.grad_norm,
            count=count,
            applied=applied,
            metrics={name: value.mean() for name, value in sums.metrics.items()},
        )
        return new_state, report

    def evaluate(
        self, trainable: Variables, buffers: Variables, frozen: Variables, batch: PyTree
    ) -> dict[str, LossSum]:
        """Computes the sums of one validation batch: `loss` and each metric. Nothing is random."""
        with use(self.sharding):
            variables = {**frozen, **buffers, **trainable}
            losses = self.losses(variables, batch, key=None, train=False)
        return {"loss": losses.loss, **losses.metrics}

    def derive_for_training(
        self, state: TrainState, frozen: Variables, batch: PyTree, index: Scalar
    ) -> PyTree:
        """Computes what completes micro-batch `index` of a step, with its random draws."""
        assert self.derive is not None
        with use(self.sharding):
            variables = {**frozen, **state.buffers, **state.trainable}
            return self.derive(variables, batch, key=self._key(state, index), train=True)

    def derive_for_validation(
        self, trainable: Variables, buffers: Variables, frozen: Variables, batch: PyTree
    ) -> PyTree:
        """Computes what completes a validation batch."""
        assert self.derive is not None
        with use(self.sharding):
            variables = {**frozen, **buffers, **trainable}
            return self.derive(variables, batch, key=None, train=False)

    def _key(self, state: TrainState, index: Scalar) -> jax.Array:
        """One key per micro-batch; the network folds in each example's index in the batch."""
        return jax.random.fold_in(jax.random.key(self.seed), state.step * self.accumulate + index)

    def micro(
        self, state: TrainState, buffers: Variables, frozen: Variables, batch: PyTree, index: Scalar
    ) -> MicroSums:
        """Computes the gradients and loss sums of micro-batch `index` of a step."""
        key = self._key(state, index)

        def objective(trainable: Variables) -> tuple[jax.Array, StepLosses]:
            variables = {**frozen, **buffers, **trainable}
            losses = self.losses(variables, batch, key=key, train=True)
            if self.nemo_exact:
                losses = replace(losses, loss=as_batch_mean(losses.loss))
            return losses.loss.total, losses

        with use(self.sharding):
            (_, losses), grads = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        return MicroSums(
            grads=grads,
            loss=losses.loss,
            metrics=losses.metrics,
            buffers=merge_buffers(buffers, losses.buffers),
        )


def as_batch_mean(loss: LossSum) -> LossSum:
    """Turns a batch's mean into a sum of count 1, so that merged batches give a mean of means."""
    is_scored = loss.count > 0
    mean = jnp.where(is_scored, loss.total / jnp.where(is_scored, loss.count, 1), 0.0)
    return LossSum(total=mean, count=is_scored.astype(jnp.float32))


def merge_buffers(old: Variables, new: Variables) -> Variables:
    """The buffers, updated by the new values. Raises KeyError for a path that is no buffer."""
    if unknown := set(new) - set(old):
        raise KeyError(f"losses returned values for {sorted(unknown)}, which are no buffers")
    return {**old, **{path: value.astype(old[path].dtype) for path, value in new.items()}}
