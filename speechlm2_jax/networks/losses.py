"""Cross-entropy in chunks: the logits of the whole batch are never in memory at once."""

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
"""Positions per chunk and device. So each device holds fp32 logits of [1024, V] at a time."""


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T *K"],
    loss_mask: Bool[Array, "B T"],
    logits_of: LogitsOf,
    *,
    sequences_per_shard: int,
) -> tuple[LossSum, LossSum]:
    """Sums -log p(target) and counts correct predictions where `loss_mask` is True.

    The scored positions of each sequence are moved to its front. The LM head then runs over chunks
    of positions and skips chunks without a target. The backward pass computes the logits of a chunk
    again, unless one chunk holds all positions.

    `sequences_per_shard` is the number of sequences on each device. It sets the length of a chunk.
    If sequences are sharded over a context axis, each device chunks its own part of a sequence.

    Returns loss and accuracy as sums with the same count. Both are fp32, whatever the dtype of the
    logits. A position with targets of K codebooks counts K times.
    """
    batch, shards = loss_mask.shape[0], context_size()
    length = loss_mask.shape[1] // shards
    chunk, keeps_logits = _chunk_length(length, sequences_per_shard)
    padded = -(-length // chunk) * chunk

    def shard(x: Array) -> Array:
        """[B, T, ...] -> [B, shards, length, ...]."""
        x = x.reshape(batch, shards, length, *x.shape[2:])
        return constrain(x, "batch", "tokens", *(None,) * (x.ndim - 2))

    def per_codebook(x: Array) -> Array:
        """[B, shards, length] -> the same with an axis of size 1 for the codebooks, if any."""
        return x.reshape(*x.shape, *(1,) * len(codebooks))

    codebooks = targets.shape[2:]
    hidden, targets, loss_mask = shard(hidden), shard(targets), shard(loss_mask)
    order = jnp.argsort(~loss_mask, axis=2, stable=True)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, padded - length)))
    scored = jnp.sum(loss_mask, axis=2)
    most_scored = jnp.max(scored)

    def chunk_sums(start: Array) -> tuple[Array, Array]:
        index = jax.lax.dynamic_slice_in_dim(order, start, chunk, axis=2)
        h = jnp.take_along_axis(hidden, index[..., None], axis=2)
        y = jnp.take_along_axis(targets, per_codebook(index), axis=2)
        mask = per_codebook((start + jnp.arange(chunk))[None, None] < scored[..., None])
        logits = logits_of(h.reshape(batch, -1, h.shape[-1])).astype(jnp.float32)
        return _scores(logits.reshape(*y.shape, -1), y, mask)

    def zero_sums(start: Array) -> tuple[Array, Array]:
        return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)

    def add_chunk(carry: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        loss, correct = jax.lax.cond(start < most_scored, chunk_sums, zero_sums, start)
        return (carry[0] + loss, carry[1] + correct), None

    result = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    starts = range(0, padded, chunk)
    if keeps_logits:
        for start in starts:
            result, _ = add_chunk(result, jnp.asarray(start))
    else:
        body = jax.checkpoint(add_chunk, prevent_cse=False)
        result, _ = jax.lax.scan(body, result, jnp.asarray(starts))
    loss, correct = result
    count = jnp.sum(loss_mask, dtype=jnp.float32) * math.prod(codebooks)
    return LossSum(total=loss, count=count), LossSum(total=correct, count=count)


def _chunk_length(length: int, sequences: int) -> tuple[int, bool]:
    """Positions of a chunk, and whether all logits are kept for the backward pass.

    They are kept if one chunk holds all positions. This takes no more memory than recomputing them
    and saves one matmul with the LM head.
    """
    chunk = min(length, max(1, CHUNK_TOKENS // sequences))
    keeps_logits = chunk == length
    return (loss_chunk(length) if keeps_logits else chunk), keeps_logits


def _scores(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], mask: Bool[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums cross-entropy and correct predictions where the mask is True."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    correct = mask & (jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == targets)
    return jnp.sum(loss), jnp.sum(correct, dtype=jnp.float32)
