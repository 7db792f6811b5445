"""Cross-entropy over a vocabulary whose logits never exist for the whole batch."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.batches import LossSum
from speechlm2_jax.layers.cpu import loss_chunk
from speechlm2_jax.sharding import constrain, context_size

LogitsOf = Callable[[Float[Array, "B T D"]], Float[Array, "B T *K V"]]
CHUNK_TOKENS = 1024
"""Scored positions per chunk and device share: logits of [1024, V] in fp32 at a time."""


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T *K"],
    loss_mask: Bool[Array, "B T"],
    logits_of: LogitsOf,
    *,
    rows_per_chunk: int,
) -> tuple[LossSum, LossSum]:
    """Sums -log p(target) and counts right guesses where `loss_mask` is True.

    Scored positions of each row move to its front, and the head runs over chunks of steps, each
    computed only if some row still has a target there and, where not all would fit one chunk,
    computed again in the backward pass.
    `rows_per_chunk` is how many rows share a device, which sets the steps of a chunk. Where devices
    share the steps of a row, each does this with its own. Returns (loss, accuracy) as sums with the
    same count; a step with targets of several codebooks counts as so many. fp32 whatever the dtype
    of the logits.
    """
    batch, shares = loss_mask.shape[0], context_size()
    steps = loss_mask.shape[1] // shares
    chunk, is_kept = _chunk_steps(steps, rows_per_chunk)
    padded = -(-steps // chunk) * chunk

    def share(x: Array) -> Array:
        """[B, T, ...] -> [B, shares, steps, ...]."""
        x = x.reshape(batch, shares, steps, *x.shape[2:])
        return constrain(x, "batch", "tokens", *(None,) * (x.ndim - 2))

    def over(x: Array) -> Array:
        """[B, shares, steps] -> the same with an axis for the codebooks, if there are any."""
        return x.reshape(*x.shape, *(1,) * len(codebooks))

    codebooks = targets.shape[2:]
    hidden, targets, loss_mask = share(hidden), share(targets), share(loss_mask)
    order = jnp.argsort(~loss_mask, axis=2, stable=True)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, padded - steps)))
    scored = jnp.sum(loss_mask, axis=2)
    width = jnp.max(scored)

    def sums(start: Array) -> tuple[Array, Array]:
        index = jax.lax.dynamic_slice_in_dim(order, start, chunk, axis=2)
        h = jnp.take_along_axis(hidden, index[..., None], axis=2)
        y = jnp.take_along_axis(targets, over(index), axis=2)
        mask = over((start + jnp.arange(chunk))[None, None] < scored[..., None])
        logits = logits_of(h.reshape(batch, -1, h.shape[-1])).astype(jnp.float32)
        return _scores(logits.reshape(*y.shape, -1), y, mask)

    def nothing(start: Array) -> tuple[Array, Array]:
        return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)

    def step(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        loss, right = jax.lax.cond(start < width, sums, nothing, start)
        return (carry[0] + loss, carry[1] + right), None

    result = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    starts = range(0, padded, chunk)
    if is_kept:
        for start in starts:
            result, _ = step(result, jnp.asarray(start))
    else:
        body = jax.checkpoint(step, prevent_cse=False)
        result, _ = jax.lax.scan(body, result, jnp.asarray(starts))
    loss, right = result
    count = jnp.sum(loss_mask, dtype=jnp.float32) * math.prod(codebooks)
    return LossSum(total=loss, count=count), LossSum(total=right, count=count)


def _chunk_steps(steps: int, rows: int) -> tuple[int, bool]:
    """Steps of a chunk, and whether all logits are kept for the backward pass.

    They are where one chunk would hold them: no more memory, and a product with the head less.
    """
    chunk = min(steps, max(1, CHUNK_TOKENS // rows))
    is_kept = chunk == steps
    return (loss_chunk(steps) if is_kept else chunk), is_kept


def _scores(
    logits: Float[Array, "*steps V"], targets: Int[Array, "*steps"], mask: Bool[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy and right guesses, summed where the mask is True."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    right = mask & (jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == targets)
    return jnp.sum(loss), jnp.sum(right, dtype=jnp.float32)
