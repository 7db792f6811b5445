"""Cross-entropy in chunks: the logits of the whole batch are never in memory at once."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
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
    weights: Float[Array, "B T"] | None = None,
    counted: Bool[Array, "B T"] | None = None,
) -> tuple[LossSum, LossSum]:
    """Sums -log p(target) and counts correct predictions where `loss_mask` is True.

    With `weights` the terms of the loss are multiplied by them; the count stays that of positions.
    With `counted` only correct predictions there are counted.

    The scored positions of each sequence are moved to its front. The LM head then runs over chunks
    of positions and skips chunks without a target. No logits are computed twice: they are kept if
    one chunk holds all positions, and else the gradient of a chunk is computed with its loss.

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

    def chunk_sums(h: Float[Array, "B S C D"], start: Array) -> tuple[Array, Array]:
        index = jax.lax.dynamic_slice_in_dim(order, start, chunk, axis=2)
        y = jnp.take_along_axis(targets, per_codebook(index), axis=2)
        mask = per_codebook((start + jnp.arange(chunk))[None, None] < scored[..., None])
        w, c = (
            None if x is None else jnp.take_along_axis(shard(x), index, axis=2)
            for x in (weights, counted)
        )
        logits = logits_of(h.reshape(batch, -1, h.shape[-1])).astype(jnp.float32)
        return _scores(logits.reshape(*y.shape, -1), y, mask, w, c)

    starts = jnp.arange(0, padded, chunk)
    rows = jnp.take_along_axis(hidden, order[..., None], axis=2)
    chunks = jnp.moveaxis(rows.reshape(batch, shards, -1, chunk, rows.shape[-1]), 2, 0)
    sums = _sums_keeping_logits if keeps_logits else _sums_with_gradients
    loss, correct = sums(chunk_sums, chunks, starts, most_scored)
    count = jnp.sum(loss_mask, dtype=jnp.float32) * math.prod(codebooks)
    return LossSum(total=loss, count=count), LossSum(total=correct, count=count)


def cross_entropy_by_sequence(
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    logits_of: LogitsOf,
    *,
    sequences_per_shard: int,
) -> LossSum:
    """Sums -log p(target) of each sequence where `loss_mask` is True; counts [B] and sums in fp32.

    The terms are those of `chunked_cross_entropy`, which adds them over the batch. For evaluation:
    it is not meant to be differentiated. Chunks of positions without a target are skipped.
    """
    batch, length = loss_mask.shape
    chunk = min(length, max(1, CHUNK_TOKENS // sequences_per_shard))

    def chunks_of(x: Array) -> Array:
        """[B, T, ...] -> [n, B, C, ...]."""
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def add(totals: Array, one: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, y, mask = one

        def more() -> Array:
            return jnp.sum(_losses(logits_of(h).astype(jnp.float32), y, mask), axis=-1)

        return totals + jax.lax.cond(jnp.any(mask), more, lambda: jnp.zeros_like(totals)), None

    nothing = constrain(jnp.zeros(batch, jnp.float32), "batch")
    chunks = chunks_of(hidden), chunks_of(targets), chunks_of(loss_mask)
    totals, _ = jax.lax.scan(add, nothing, chunks)
    return LossSum(total=totals, count=jnp.sum(loss_mask, axis=1, dtype=jnp.float32))


ChunkSums = Callable[..., tuple[Array, Array]]
"""(hidden states of a chunk, where it starts) -> loss and correct predictions."""


def _sums_keeping_logits(
    chunk_sums: ChunkSums, chunks: Float[Array, "n B S C D"], starts: Array, end: Array
) -> tuple[Array, Array]:
    """Sums over the chunks that start before `end`."""
    loss = correct = jnp.zeros((), jnp.float32)
    for number in range(len(chunks)):
        more = jax.lax.cond(
            starts[number] < end, chunk_sums, _no_sums, chunks[number], starts[number]
        )
        loss, correct = loss + more[0], correct + more[1]
    return loss, correct


def _no_sums(*_: Array) -> tuple[Array, Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def _sums_with_gradients(
    chunk_sums: ChunkSums, chunks: Float[Array, "n B S C D"], starts: Array, end: Array
) -> tuple[Array, Array]:
    """The same; under differentiation the gradient of each chunk is computed with its loss.

    A loss is a number, so its gradient is known up to a factor as soon as the logits are
    (Liger Kernel's fused linear cross-entropy does the same). Only what is differentiated gets one.
    """
    converted, weights = jax.closure_convert(chunk_sums, chunks[0], starts[0])

    @jax.custom_vjp
    def sums(chunks: Array, weights: Sequence[Array], starts: Array, end: Array) -> Any:
        def add(total: tuple[Array, Array], one: tuple[Array, Array]) -> Any:
            h, start = one
            more = jax.lax.cond(
                start < end, lambda: converted(h, start, *weights), lambda: _no_sums()
            )
            return jax.tree.map(jnp.add, total, more), None

        return jax.lax.scan(add, _no_sums(), (chunks, starts))[0]

    def forward(chunks: Any, weights: Any, starts: Any, end: Any) -> Any:
        is_wanted = [weight.perturbed for weight in weights]
        chunks, starts, end = chunks.value, starts.value, end.value
        values = [weight.value for weight in weights]
        wanted = [value for value, wants in zip(values, is_wanted, strict=True) if wants]

        def add(total: Any, one: tuple[Array, Array]) -> Any:
            h, start = one

            def computed() -> Any:
                loss, back, correct = jax.vjp(
                    lambda h, w: converted(h, start, *_replaced(values, is_wanted, w)),
                    *(h, wanted),
                    has_aux=True,
                )
                slope, slopes = back(jnp.ones_like(loss))
                more = (loss, correct, [one.astype(jnp.float32) for one in slopes])
                return jax.tree.map(jnp.add, total, more), slope

            return jax.lax.cond(start < end, computed, lambda: (total, jnp.zeros_like(h)))

        nothing = [jnp.zeros(weight.shape, jnp.float32) for weight in wanted]
        (loss, correct, slopes), slope = jax.lax.scan(add, (*_no_sums(), nothing), (chunks, starts))
        slopes = [one.astype(weight.dtype) for one, weight in zip(slopes, wanted, strict=True)]
        return (loss, correct), (slope, _replaced([None] * len(values), is_wanted, slopes))

    def backward(slopes: tuple[Array, list[Array | None]], cotangents: tuple[Any, Any]) -> Any:
        factor = cotangents[0]  # of the loss; that of the correct predictions has no meaning
        if isinstance(factor, SymbolicZero):
            return None, [None] * len(slopes[1]), None, None
        of_chunks, of_weights = jax.tree.map(lambda one: (one * factor).astype(one.dtype), slopes)
        return of_chunks, of_weights, None, None

    sums.defvjp(forward, backward, symbolic_zeros=True)
    return sums(chunks, weights, starts, end)


def _replaced(values: Sequence[Any], is_replaced: Sequence[bool], others: Sequence[Any]) -> Any:
    """The values, some of them replaced by the others in order."""
    coming = iter(others)
    pairs = zip(values, is_replaced, strict=True)
    return [next(coming) if replaces else value for value, replaces in pairs]


def _chunk_length(length: int, sequences: int) -> tuple[int, bool]:
    """Positions of a chunk, and whether all logits are kept for the backward pass.

    They are kept if one chunk holds all positions. This takes no more memory than recomputing them
    and saves one matmul with the LM head.
    """
    chunk = min(length, max(1, CHUNK_TOKENS // sequences))
    keeps_logits = chunk == length
    return (loss_chunk(length) if keeps_logits else chunk), keeps_logits


def _scores(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    mask: Bool[Array, "..."],
    weights: Float[Array, "..."] | None = None,
    counted: Bool[Array, "..."] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums (weighted) cross-entropy and correct predictions where the mask is True."""
    loss = _losses(logits, targets, mask)
    loss = loss if weights is None else loss * weights
    mask = mask if counted is None else mask & counted
    correct = mask & (jnp.argmax(jax.lax.stop_gradient(logits), axis=-1) == targets)
    return jnp.sum(loss), jnp.sum(correct, dtype=jnp.float32)


def _losses(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], mask: Bool[Array, "..."]
) -> Float[Array, "*batch"]:
    """The cross-entropy of each position; 0 where the mask is False."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
