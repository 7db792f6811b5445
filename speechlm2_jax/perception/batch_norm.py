"""Batch normalisation over real frames only. New running statistics are returned, not stored."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from speechlm2_jax.layers.linear import ones, zeros
from speechlm2_jax.layers.module import buffer, param

EPS = 1e-5
MOMENTUM = 0.1
Statistics = dict[str, Array]
"""New buffer values, keyed by dotted path relative to the module that returns them."""


class BatchNorm(nnx.Module):
    """Normalises each channel by its mean and variance (Ioffe and Szegedy 2015), in fp32.

    Evaluation uses the running mean and variance. Training uses those of the counted frames of the
    global batch, and moves the running ones towards them by `MOMENTUM` (with the unbiased variance,
    as torch does).
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.weight = param(rngs, (width,), ("norm",), ones)
        self.bias = param(rngs, (width,), ("norm",), zeros)
        self.running_mean = buffer(jnp.zeros(width), ("norm",))
        self.running_var = buffer(jnp.ones(width), ("norm",))
        self.batches_tracked = buffer(jnp.zeros((), jnp.int32), ())

    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Statistics]:
        """Normalises `x`. `counted` switches to training mode and marks the frames to measure.

        Also returns the new running statistics: {} in evaluation, unchanged if no frame counts.
        """
        x32 = x.astype(jnp.float32)
        mean, variance = self.running_mean[...], self.running_var[...]
        statistics: Statistics = {}
        if counted is not None:
            mean, variance, statistics = self._batch_statistics(x32, counted)
        scale = self.weight[...].astype(jnp.float32) * jax.lax.rsqrt(variance + EPS)
        y = (x32 - mean[None, None]) * scale[None, None]
        return (y + self.bias[...].astype(jnp.float32)[None, None]).astype(x.dtype), statistics

    def _batch_statistics(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"]
    ) -> tuple[Float[Array, " D"], Float[Array, " D"], Statistics]:
        count = jnp.sum(counted, dtype=jnp.float32)
        mask = counted[..., None]
        mean = jnp.sum(jnp.where(mask, x, 0.0), axis=(0, 1)) / jnp.maximum(count, 1.0)
        squares = jnp.where(mask, jnp.square(x - mean[None, None]), 0.0)
        total = jnp.sum(squares, axis=(0, 1))
        unbiased = total / jnp.maximum(count - 1.0, 1.0)
        rate = jnp.where(count > 0, MOMENTUM, 0.0)

        def update(old: Array, new: Array) -> Array:
            return old + rate * (jax.lax.stop_gradient(new) - old)

        statistics = {
            "running_mean": update(self.running_mean[...], mean),
            "running_var": update(self.running_var[...], unbiased),
            "batches_tracked": self.batches_tracked[...] + (count > 0).astype(jnp.int32),
        }
        return mean, total / jnp.maximum(count, 1.0), statistics
