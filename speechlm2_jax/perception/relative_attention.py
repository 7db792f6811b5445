"""Self-attention with relative positions (Transformer-XL, Dai et al. 2019) for Conformers.

score(i, j) = [(q_i + u) . k_j + (q_i + v) . (W p_{i-j})] / sqrt(H), with learnt u and v and a fixed
sinusoid table p. A frame sees the frames of its context; a padded one sees none, and gets zeros.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.dropout import drop_weights
from speechlm2_jax.layers.linear import Linear, zeros
from speechlm2_jax.layers.module import param
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.sharding import constrain

BLOCK = 256
"""Queries scored at once: memory grows with the length of the input, not with its square."""
_BLOCKED = -1e4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class View:
    """What each frame of a batch may attend to, and where it stands."""

    positions: Float[Array, "*B P D"]
    """Sinusoids of the distances T' - 1 .. -(T - 1), T' the queries padded to whole blocks."""
    lengths: Int[Array, " B"]
    left: Int[Array, " B"]
    """Frames seen to the left; -1 for all."""
    right: Int[Array, " B"]


def padded_queries(steps: int) -> int:
    """Rounds a number of queries up to whole blocks; short inputs are one block of their own."""
    return steps if steps <= BLOCK else -(-steps // BLOCK) * BLOCK


def relative_positions(steps: int, width: int) -> Float[Array, "P D"]:
    """Tabulates sinusoids of every distance i - j, farthest left first: sine even, cosine odd."""
    first = padded_queries(steps) - 1
    distances = np.arange(first, -steps, -1, dtype=np.float32)
    rates = np.exp(np.arange(0, width, 2, dtype=np.float32) * np.float32(-np.log(1e4) / width))
    angles = jnp.asarray(distances)[:, None] * jnp.asarray(rates)[None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(-1, width)


def position_bias(config: FastConformerConfig, rngs: nnx.Rngs) -> nnx.Param:
    """Makes one of the learnt biases u and v, [heads, head width]."""
    shape = (config.n_heads, config.d_model // config.n_heads)
    return param(rngs, shape, ("heads", None), zeros)


class RelativeAttention(nnx.Module):
    """Multi-head attention over [B, T, D] with relative positions."""

    def __init__(self, config: FastConformerConfig, *, rngs: nnx.Rngs):
        width, bias = config.d_model, config.use_bias
        self.config = config
        self.query = Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=bias)
        self.key = Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=bias)
        self.value = Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=bias)
        self.position = Linear(width, width, axes=("heads", "embed"), rngs=rngs, bias=False)
        self.output = Linear(width, width, axes=("embed", "heads"), rngs=rngs, bias=bias)
        own = config.untie_biases
        self.position_bias_u = position_bias(config, rngs) if own else None
        self.position_bias_v = position_bias(config, rngs) if own else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        view: View,
        *,
        tied_biases: tuple[Float[Array, "N H"], Float[Array, "N H"]] | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Mixes frames; `keys` switches dropout of the attention weights on."""
        query, key, value = (self._heads(p(x)) for p in (self.query, self.key, self.value))
        positions = self._heads(self.position(view.positions.astype(x.dtype)))
        if self.position_bias_u is not None and self.position_bias_v is not None:
            biases = (self.position_bias_u[...], self.position_bias_v[...])
        elif tied_biases is not None:
            biases = tied_biases
        else:
            raise ValueError("tied position biases must be given when the layer has none")
        by_content, by_distance = (query + b.astype(x.dtype)[None, None] for b in biases)
        mixed = self._attend(by_content, by_distance, key, value, positions, view, keys)
        return self.output(mixed.reshape(x.shape))

    def _heads(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T N H"]:
        heads = self.config.n_heads
        return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

    def _attend(
        self,
        by_content: Float[Array, "B T N H"],
        by_distance: Float[Array, "B T N H"],
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        positions: Float[Array, "*B P N H"],
        view: View,
        keys: Key[Array, " B"] | None,
    ) -> Float[Array, "B T N H"]:
        """Scores the queries block by block, and averages the values with the weights."""
        steps = key.shape[1]
        total = padded_queries(steps)
        size = min(total, BLOCK)
        extra = ((0, 0), (0, total - steps), (0, 0), (0, 0))
        queries = [jnp.pad(q, extra) for q in (by_content, by_distance)]

        def attend_block(first: Int[Array, ""] | int) -> Float[Array, "B size N H"]:
            content, distance = (
                jax.lax.dynamic_slice_in_dim(q, first, size, axis=1) for q in queries
            )
            # distances of this block: first + size - 1 down to first - (T - 1)
            near = jax.lax.dynamic_slice_in_dim(
                positions, total - size - first, size + steps - 1, axis=-3
            )
            scores = _scores(content, distance, key, near)
            rows = first + jnp.arange(size)
            visible = visibility(self.config.att_context_style, view, rows, steps)
            weights = _weights(scores, visible)
            weights = drop_weights(weights, self.config.dropout_att, keys, rows)
            return jnp.einsum("bnqk,bknh->bqnh", weights.astype(value.dtype), value)

        if size == total:
            return attend_block(0)
        blocks = jax.lax.map(jax.checkpoint(attend_block), jnp.arange(0, total, size))
        mixed = jnp.moveaxis(blocks, 0, 1).reshape(key.shape[0], total, *key.shape[2:])
        return mixed[:, :steps]


def visibility(style: str, view: View, rows: Int[Array, " Q"], steps: int) -> Bool[Array, "B Q T"]:
    """True where the frame at `rows` may attend to a frame: both real, the latter in context.

    `regular` counts frames to both sides. `chunked_limited` cuts time into chunks of right + 1:
    a frame sees its whole chunk and left / (right + 1) chunks before it.
    """
    column = jnp.arange(steps)[None, None, :]
    row = rows[None, :, None]
    left, right = view.left[:, None, None], view.right[:, None, None]
    before = (left < 0) | (row - column <= left)
    if style == "regular":
        in_context = before & ((right < 0) | (column - row <= right))
    else:
        chunk = jnp.maximum(right, 0) + 1
        chunks_back = row // chunk - column // chunk
        chunked = (chunks_back >= 0) & ((left < 0) | (chunks_back <= left // chunk))
        in_context = jnp.where(right < 0, before, chunked)
    lengths = view.lengths[:, None, None]
    return in_context & (row < lengths) & (column < lengths)


def _scores(
    by_content: Float[Array, "B Q N H"],
    by_distance: Float[Array, "B Q N H"],
    key: Float[Array, "B T N H"],
    positions: Float[Array, "*B P N H"],
) -> Float[Array, "B N Q T"]:
    shared = positions.ndim == 3
    content = jnp.einsum("bqnh,bknh->bnqk", by_content, key, preferred_element_type=jnp.float32)
    distance = jnp.einsum(
        "bqnh,pnh->bnqp" if shared else "bqnh,bpnh->bnqp",
        by_distance,
        positions,
        preferred_element_type=jnp.float32,
    )
    scores = content + _skew(distance, key.shape[1])
    return constrain(scores * key.shape[-1] ** -0.5, "clips", "act_heads", None, None)


def _skew(scores: Float[Array, "B N Q P"], steps: int) -> Float[Array, "B N Q T"]:
    """Turns columns of distances into columns of keys: entry (i, j) is column Q - 1 - i + j.

    In the flattened block that is offset Q - 1 + i (P - 1) + j: one slice, then shorter rows.
    """
    batch, heads, rows, columns = scores.shape
    if rows == 1:
        return scores
    flat = scores.reshape(batch, heads, rows * columns)
    flat = flat[..., rows - 1 : rows - 1 + rows * (columns - 1)]
    return flat.reshape(batch, heads, rows, columns - 1)[..., :steps]


def _weights(
    scores: Float[Array, "B N Q T"], visible: Bool[Array, "B Q T"]
) -> Float[Array, "B N Q T"]:
    """Softmax over what is visible; a row that sees nothing is all zeros."""
    mask = visible[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, _BLOCKED), axis=-1)
    return jnp.where(mask, weights, 0.0)
