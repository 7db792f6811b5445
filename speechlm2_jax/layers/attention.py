"""Scaled dot-product attention: one table of which implementation computes which case."""

import logging
from dataclasses import dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.block_attention import block_attention, saves
from speechlm2_jax.layers.cudnn_attention import WIDEST_HEAD, cudnn_attention
from speechlm2_jax.layers.dense_attention import dense_attention
from speechlm2_jax.layers.quantized import Heads, QuantizedArray
from speechlm2_jax.layers.ragged_attention import LANES, Pages, ragged_attention, tiles_heads
from speechlm2_jax.layers.ring_attention import ring_attention
from speechlm2_jax.layers.scores import Scores
from speechlm2_jax.layers.splash_attention import splash_attention
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import context_size, platform, tensor_size

MASKED_KEY = -1
"""Segment id of a key that no query may attend to."""
SPLASH_MIN_TOKENS = 256
"""Shortest sequence for the splash kernel on a TPU: its blocks are 128 to 512 tokens."""
ROWS, SEGMENTS, CACHE, RING, SLOTS = "rows", "segments", "cache", "ring", "slots"
"""What the tokens of a row are: one sequence and padding after it; any sequences and masked tokens;
new tokens that attend to a cache; parts of sequences on the devices of a context axis; one new
token of a sequence in continuous batching, which may have a cache of pages."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the choice of an implementation depends on."""

    platform: str
    """cpu, gpu or tpu."""
    kind: str
    """ROWS, SEGMENTS, CACHE, RING or SLOTS."""
    tokens: int
    head_width: int
    dtype: jnp.dtype
    is_capped: bool = False
    """Whether scores have a soft cap."""
    is_chunked: bool = False
    """Chunks count positions within a segment; kernels know only those of the whole row."""
    divides: bool = True
    """Whether the tensor axis divides the key and value heads: a device has whole groups."""
    reach: int | None = None
    """Tokens, itself included, that a query may attend to; None: all before it."""
    kv_heads: int = 1
    """Key and value heads of one device, for SLOTS."""


def implementation(case: Case) -> str:
    """ring, splash, ragged, cudnn, blocks or dense: the first line of the table that fits.

    | name | platform | rows | further |
    |---|---|---|---|
    | ring | any | ring | no chunks |
    | splash | tpu | rows, segments | at least `SPLASH_MIN_TOKENS` tokens, no chunks |
    | ragged | tpu | slots | heads of 128 that fill tiles (`tiles_heads`), no chunks |
    | cudnn | gpu | rows | 16-bit, heads of at most 256 and a multiple of 8, no cap, no chunks |
    | blocks | any | rows, segments | at most half of the scores within `reach`, no chunks |
    | dense | any | any | |
    """
    if case.is_chunked:
        return "dense"
    if case.kind == RING:
        return "ring"
    is_long = case.tokens >= SPLASH_MIN_TOKENS
    if case.platform == "tpu" and case.kind in (ROWS, SEGMENTS) and is_long and case.divides:
        return "splash"
    if case.platform == "tpu" and case.kind == SLOTS and case.divides and _is_paged(case):
        return "ragged"
    is_fit = case.dtype.itemsize == 2 and case.head_width <= WIDEST_HEAD and not case.head_width % 8
    is_whole = case.kind == ROWS and case.divides
    if case.platform == "gpu" and is_whole and is_fit and not case.is_capped:
        return "cudnn"
    is_near = case.kind in (ROWS, SEGMENTS) and saves(case.tokens, case.reach)
    return "blocks" if is_near else "dense"


def _is_paged(case: Case) -> bool:
    return case.head_width == LANES and tiles_heads(case.kv_heads, case.dtype)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """A causal mask within segments: a query attends to keys of its segment, at or before it.

    Segment ids and offsets instead of a dense [T, S] mask let a kernel skip whole blocks. Key s is
    at index s and query t at index `offset` + t, unless `ring_order` gives the indices. `window`
    and `chunk` narrow the mask by the tokens' positions in their own sequences.
    """

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    """`MASKED_KEY` hides a key from every query."""
    offset: Int[Array, ""] | Int[Array, " B"] | int | None = None
    """Index of the first query, or of each sequence's; None without a cache: queries and keys are
    the same tokens."""
    ring_order: Int[Array, " T"] | np.ndarray | None = None
    """Index of each query and key, where the tokens are in another order (ring attention)."""
    window: int | None = field(default=None, metadata={"static": True})
    """Sliding window: a query attends to keys less than `window` positions before it."""
    chunk: int | None = field(default=None, metadata={"static": True})
    """Chunked attention: a query attends to keys of its own chunk of `chunk` positions."""
    query_positions: Int[Array, "B T"] | None = None
    """Position of each query in its sequence; needed with `window` or `chunk`."""
    key_positions: Int[Array, "B S"] | None = None
    by_position: bool = field(default=False, metadata={"static": True})
    """Compare positions, not indices, for causality: the keys are in a ring buffer."""
    unpacked: bool = field(default=False, metadata={"static": True})
    """True only if every row is one segment from its first token, and padding after it."""
    longest: int | None = field(default=None, metadata={"static": True})
    """No segment has more tokens than this, and those of each are adjacent; None: unknown."""

    @property
    def reach(self) -> int | None:
        """Tokens, itself included, that a query may attend to; None: all before it."""
        return min((n for n in (self.window, self.longest) if n is not None), default=None)

    @property
    def kind(self) -> str:
        """What the tokens of a row are, for `Case`."""
        if self.ring_order is not None and context_size() > 1:
            return RING
        if self.ring_order is not None or self.offset is not None or self.by_position:
            return CACHE
        return ROWS if self.unpacked else SEGMENTS

    def dense(self) -> Bool[Array, "B T S"]:
        """Returns the dense mask; True where query t may attend to key s."""
        queries, keys = self.query_segments, self.key_segments
        if self.by_position:
            query_positions, key_positions = self._positions()
            before = key_positions <= query_positions
        elif isinstance(self.offset, jax.Array) and self.offset.ndim:
            query_index = self.offset[:, None] + jnp.arange(queries.shape[1])[None]
            before = jnp.arange(keys.shape[1])[None, None] <= query_index[:, :, None]
        elif self.ring_order is None:
            offset = 0 if self.offset is None else self.offset
            query_index = offset + jnp.arange(queries.shape[1])
            before = (jnp.arange(keys.shape[1])[None, :] <= query_index[:, None])[None, :, :]
        else:
            index = jnp.asarray(self.ring_order)
            before = (index[None, :] <= index[:, None])[None, :, :]
        mask = before & (queries[:, :, None] == keys[:, None, :])
        if self.window is not None:
            query_positions, key_positions = self._positions()
            mask &= query_positions - key_positions < self.window
        if self.chunk is not None:
            query_positions, key_positions = self._positions()
            mask &= query_positions // self.chunk == key_positions // self.chunk
        return mask

    def _positions(self) -> tuple[Int[Array, "B T 1"], Int[Array, "B 1 S"]]:
        assert self.query_positions is not None and self.key_positions is not None
        return self.query_positions[:, :, None], self.key_positions[:, None, :]


def attend(
    q: Float[Array, "B T N H"],
    k: Heads | Pages,
    v: Heads | Pages,
    *,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: N / N_kv query heads share one key/value head. Softmax in fp32.

    Keys and values are [B, S, N_kv, H]; those of a cache may be quantized, or in pages.
    With `softcap` a score s becomes softcap * tanh(s / softcap) (Gemma 2). `implementation` chooses
    what computes it. The platform is that of the mesh's devices, not JAX's default backend: they
    differ in ahead-of-time compilation. The output of a query without any key is finite, and not to
    be used.
    """
    scores = Scores(scale=scale, softcap=softcap, window=mask.window)
    if isinstance(k, Pages):  # `implementation` chose ragged when the cache was made
        assert v is k
        return ragged_attention(q, k, scores)
    assert not isinstance(v, Pages)
    if isinstance(k, QuantizedArray) or isinstance(v, QuantizedArray):
        return dense_attention(q, k, v, mask.dense(), scores)
    case = Case(
        platform=platform(),
        kind=mask.kind,
        tokens=q.shape[1],
        head_width=q.shape[-1],
        dtype=q.dtype,
        is_capped=softcap is not None,
        is_chunked=mask.chunk is not None,
        divides=k.shape[2] % tensor_size() == 0,
        reach=mask.reach,
    )
    chosen = implementation(case)
    queries, keys = mask.query_segments, mask.key_segments
    if chosen == "ring":
        order = jnp.asarray(mask.ring_order)
        return ring_attention(
            q, k, v, query_segments=queries, key_segments=keys, ring_order=order, scores=scores
        )
    if chosen == "splash":
        near = replace(scores, window=mask.reach)
        return splash_attention(q, k, v, query_segments=queries, key_segments=keys, scores=near)
    if chosen == "cudnn":
        lengths = jnp.sum(keys != MASKED_KEY, axis=1, dtype=jnp.int32)
        try:
            return cudnn_attention(q, k, v, lengths=lengths, scores=scores)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # an older GPU or cuDNN
            _log_once(f"cuDNN's attention cannot be used: {error}; plain attention takes its place")
    if chosen == "blocks":
        assert case.reach is not None
        return block_attention(
            *(q, k, v),
            query_segments=queries,
            key_segments=keys,
            scores=scores,
            reach=case.reach,
            masked_key=MASKED_KEY,
        )
    return dense_attention(q, k, v, mask.dense(), scores)


@cache
def _log_once(line: str) -> None:
    log.warning("%s", line)
