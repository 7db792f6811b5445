"""Conformer self-attention, with relative positions (Transformer-XL, Dai et al. 2019) or without.

score(i, j) = [(q_i + u) . k_j + (q_i + v) . (W p_{i-j})] / sqrt(H), with learnt u and v and a fixed
sinusoid table p; with absolute positions q_i . k_j / sqrt(H). A frame attends to its context only;
a padded frame attends to nothing and gives zeros.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.dropout import drop_weights
from speechlm2_jax.layers.linear import Linear, zeros
from speechlm2_jax.layers.module import param
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frame_mask import FrameMask, attention_mask, distances
from speechlm2_jax.sharding import constrain

BLOCK = 256
"""Queries scored at once, so that memory grows linearly with the length of the input."""
_BLOCKED = -1e4
"""Score of a masked key, as in NeMo."""
Biases = tuple[Float[Array, "N H"], Float[Array, "N H"]]


def padded_queries(length: int) -> int:
    """Rounds a number of queries up to whole blocks. Up to BLOCK queries are one block."""
    return length if length <= BLOCK else -(-length // BLOCK) * BLOCK


def relative_positions(length: int, width: int) -> Float[Array, "P D"]:
    """Embeds all distances query - key, largest first; queries are padded to whole blocks."""
    return distances(padded_queries(length) - 1, 1 - length, width)


def position_bias(config: FastConformerConfig, rngs: nnx.Rngs) -> nnx.Param:
    """Makes one of the learnt biases u and v, [heads, head width]."""
    shape = (config.n_heads, config.d_model // config.n_heads)
    return param(rngs, shape, ("heads", None), zeros)


class RelPosSelfAttention(nnx.Module):
    """Multi-head attention over [B, T, D]."""

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        width, bias = config.d_model, config.use_bias
        self.config = config
        self.query = Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=bias)
        self.key = Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=bias)
        self.value = Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=bias)
        self.position = (
            Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=False)
            if config.is_relative
            else None
        )
        self.output = Linear(width, width, axes=("embed", "heads"), rngs=rngs, bias=bias)
        own = config.is_relative and config.untie_biases
        self.position_bias_u = position_bias(config, rngs) if own else None
        self.position_bias_v = position_bias(config, rngs) if own else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        frame_mask: FrameMask,
        *,
        tied_biases: Biases | None = None,
        rngs: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends. Given `rngs`, dropout of the attention weights is on."""
        key, value = self.heads(self.key(x)), self.heads(self.value(x))
        queries = self.queries(x, tied_biases)
        positions = None
        if self.position is not None and frame_mask.positions is not None:
            positions = self.heads(self.position(frame_mask.positions.astype(x.dtype)))
        mixed = self._attend(queries, key, value, positions, frame_mask, rngs)
        return self.output(mixed.reshape(x.shape))

    @property
    def scale(self) -> float:
        """Factor of the scores: 1 / sqrt(head width)."""
        return (self.config.d_model // self.config.n_heads) ** -0.5

    def heads(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T N H"]:
        """Splits the width into heads."""
        heads = self.config.n_heads
        return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

    def queries(
        self, x: Float[Array, "B T D"], tied_biases: Biases | None
    ) -> tuple[Float[Array, "B T N H"], ...]:
        """Computes q, or with relative positions (q + u, q + v): for keys and for distances."""
        query = self.heads(self.query(x))
        if self.position is None:
            return (query,)
        if self.position_bias_u is not None and self.position_bias_v is not None:
            biases = (self.position_bias_u[...], self.position_bias_v[...])
        elif tied_biases is not None:
            biases = tied_biases
        else:
            raise ValueError("this layer has no position biases; pass `tied_biases`")
        return tuple(query + b.astype(x.dtype)[None, None] for b in biases)

    def _attend(
        self,
        queries: tuple[Float[Array, "B T N H"], ...],
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        positions: Float[Array, "*B P N H"] | None,
        frame_mask: FrameMask,
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B T N H"]:
        """Attends block by block of queries; each block is recomputed in the backward pass."""
        length = key.shape[1]
        total = padded_queries(length)
        size = min(total, BLOCK)
        extra = ((0, 0), (0, total - length), (0, 0), (0, 0))
        queries = tuple(jnp.pad(q, extra) for q in queries)
        key_positions = jnp.arange(length)[None]

        def attend_block(start: Int[Array, ""] | int) -> Float[Array, "B size N H"]:
            block_queries = [jax.lax.dynamic_slice_in_dim(q, start, size, axis=1) for q in queries]
            by_distance = None
            if positions is not None:
                # distances of this block: start + size - 1 down to start - (T - 1)
                block_distances = jax.lax.dynamic_slice_in_dim(
                    positions, total - size - start, size + length - 1, axis=-3
                )
                by_distance = _distance_scores(block_queries[1], block_distances)
            query_positions = start + jnp.arange(size)
            mask = attention_mask(
                self.config.att_context_style, frame_mask, query_positions[None], key_positions
            )
            by_content = content_scores(block_queries[0], key)
            weights = attention_weights(by_content, by_distance, mask, self.scale)
            weights = drop_weights(weights, self.config.dropout_att, rngs, query_positions)
            return mix(weights, value)

        if size == total:
            return attend_block(0)
        blocks = jax.lax.map(jax.checkpoint(attend_block), jnp.arange(0, total, size))
        mixed = jnp.moveaxis(blocks, 0, 1).reshape(key.shape[0], total, *key.shape[2:])
        return mixed[:, :length]


def content_scores(
    queries: Float[Array, "B Q N H"], key: Float[Array, "B T N H"]
) -> Float[Array, "B N Q T"]:
    """Scores keys by content, accumulated in fp32."""
    return jnp.einsum("bqnh,bknh->bnqk", queries, key, preferred_element_type=jnp.float32)


def _distance_scores(
    queries: Float[Array, "B Q N H"], positions: Float[Array, "*B P N H"]
) -> Float[Array, "B N Q P"]:
    return jnp.einsum(
        "bqnh,pnh->bnqp" if positions.ndim == 3 else "bqnh,bpnh->bnqp",
        queries,
        positions,
        preferred_element_type=jnp.float32,
    )


def attention_weights(
    by_content: Float[Array, "B N Q T"],
    by_distance: Float[Array, "B N Q P"] | None,
    mask: Bool[Array, "B Q T"],
    scale: float,
) -> Float[Array, "B N Q T"]:
    """Softmax of the summed, scaled scores where `mask` is True; zeros where a query has no key.

    `by_distance[..., p]` belongs to the p-th largest distance of the whole block of queries.
    """
    scores = by_content
    if by_distance is not None:
        scores = scores + _skew(by_distance, by_content.shape[-1])
    scores = constrain(scores * scale, "clips", "act_heads", None, None)
    mask = mask[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, _BLOCKED), axis=-1)
    return jnp.where(mask, weights, 0.0)


def mix(
    weights: Float[Array, "B N Q T"], value: Float[Array, "B T N H"]
) -> Float[Array, "B Q N H"]:
    """Averages the values with the attention weights."""
    return jnp.einsum("bnqk,bknh->bqnh", weights.astype(value.dtype), value)


def _skew(scores: Float[Array, "B N Q P"], length: int) -> Float[Array, "B N Q T"]:
    """Reorders scores by distance into scores by key: (i, j) takes distance index Q - 1 - i + j.

    In the flattened [Q * P] block that is offset Q - 1 + i (P - 1) + j: a slice and a reshape to
    rows of P - 1 (the relative shift of Transformer-XL, without a gather).
    """
    batch, heads, n_queries, n_distances = scores.shape
    if n_queries == 1:
        return scores
    flat = scores.reshape(batch, heads, n_queries * n_distances)
    flat = flat[..., n_queries - 1 : n_queries - 1 + n_queries * (n_distances - 1)]
    return flat.reshape(batch, heads, n_queries, n_distances - 1)[..., :length]
