"""The speech decoder: an LLM's hidden states and the codes so far -> the next frame's codes.

NeMo's TransformerARSpeechDecoder. Per frame: project the hidden state to the decoder's width, add
the mean embedding of the previous frame's K codes, run the transformer, compute the logits of each
codebook. With classifier-free guidance (Ho and Salimans 2022) some training sequences get no hidden
states, and inference extrapolates from the unconditional to the conditional output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import Embedding, Linear
from speechlm2_jax.layers.stack import RematPolicy, scan_layers, stack
from speechlm2_jax.layers.words import floats
from speechlm2_jax.sharding import constrain, time_order, unsharded_time
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from speechlm2_jax.speech_decoder.transformer import Transformer, TransformerState

_GUIDANCE_RNG, _TRANSFORMER_RNG = range(2)


class DecoderStep(NamedTuple):
    """Logits of the next codes in fp32, and the new state."""

    logits: Float[Array, "B T K V"]
    state: TransformerState


class SpeechDecoder(nnx.Module):
    """Predicts K codebooks of V codes each (control codes included) from LLM hidden states."""

    def __init__(
        self,
        config: SpeechDecoderConfig,
        *,
        input_width: int,
        codebooks: int,
        codes_per_codebook: int,
        rngs: nnx.Rngs,
    ):
        width = config.d_model
        self.config = config
        self.codebooks = codebooks
        self.projection = (
            Linear(input_width, width, axes=(None, "embed"), rngs=rngs)
            if input_width != width
            else None
        )
        self.code_embeddings = (
            stack(
                lambda rngs: Embedding(
                    codes_per_codebook, width, rngs=rngs, init=jax.nn.initializers.normal(1.0)
                ),
                codebooks,
                rngs,
            )
            if config.cond_on_prev_audio_tokens
            else None
        )
        self.transformer = Transformer(config, rngs=rngs)
        self.head = Linear(
            width, codebooks * codes_per_codebook, axes=("vocab", "embed"), rngs=rngs
        )

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
        rngs: Key[Array, " B"] | None = None,
        remat: RematPolicy = "full",
    ) -> Float[Array, "B T K V"]:
        """Computes the logits of all frames in fp32: `logits(decode(...))`; see `decode`."""
        states = self.decode(hidden, codes, mask=mask, train=train, rngs=rngs, remat=remat)
        return self.logits(states)

    def decode(
        self,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        *,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
        rngs: Key[Array, " B"] | None = None,
        remat: RematPolicy = "full",
    ) -> Float[Array, "B T W"]:
        """Computes the inputs of the head, in the dtype of `hidden`.

        `codes[:, t]` are the codes of frame t - 1 (the delay code first). None is allowed if the
        config does not condition on codes. `mask` is False at padding. In evaluation a guided
        config mixes the states with and without `hidden`; the head is linear, so this equals mixing
        the logits. In training `rngs`, one key per sequence, turn on dropout and the dropping of
        `hidden`.

        On a mesh with a context axis, time has the order of `Sharding.time_order`. Convolutions
        need neighbouring frames, so time is put back in order and the batch is sharded instead.
        """
        order = time_order(hidden.shape[1])
        with unsharded_time():
            if order is not None:
                inverse_order = order.argsort()
                hidden = _reorder(hidden, inverse_order)
                codes = None if codes is None else _reorder(codes, inverse_order)
                mask = None if mask is None else _reorder(mask, inverse_order)
            x = self._conditioning(hidden)
            if train:
                x = self._drop_conditioning(x, rngs)
            is_guided = self.config.is_guided and not train
            x, mask = self._input(x, codes, mask, is_guided=is_guided)
            x = self.transformer(
                x,
                mask=mask,
                rngs=fold_rngs(rngs, _TRANSFORMER_RNG) if train else None,
                remat=remat,
            )
            x = self._guide(x) if is_guided else x
            x = x if order is None else _reorder(x, order)
        return constrain(x, "batch", "time", "act_embed")

    def embed(self, codes: Int[Array, "B T K"] | None) -> Float[Array, "B T W"]:
        """Computes the mean embedding of K codes in fp32, one codebook after the other.

        So no [B, T, K, W] array exists, and the backward pass writes each table once. Raises
        ValueError for another number of codebooks.
        """
        tables = self.code_embeddings
        if tables is None or codes is None or codes.shape[-1] != self.codebooks:
            found = None if codes is None else codes.shape
            raise ValueError(
                f"the speech decoder takes codes [B, T, {self.codebooks}], got {found}"
            )

        def add(table: Embedding, total: Array, ids: Array) -> tuple[Array, None]:
            return total + table(ids).astype(jnp.float32), None

        start = jnp.zeros((*codes.shape[:2], self.config.d_model), jnp.float32)
        by_codebook = jnp.moveaxis(codes, -1, 0)  # [K, B, T]
        total, _ = scan_layers(tables, add, start, by_codebook, remat="none")
        return constrain(total / self.codebooks, "batch", "tokens", "act_embed")

    def logits(self, states: Float[Array, "B T W"]) -> Float[Array, "B T K V"]:
        """Computes the logits of every codebook in fp32, whatever the dtype of `states`."""
        states = constrain(states, "batch", "tokens", "act_embed")
        weight = constrain(floats(self.head.weight[...], states.dtype), "vocab", None)
        weight = weight.reshape(self.codebooks, -1, weight.shape[1])  # [K, V, W]
        weight = constrain(weight, "vocab", None, None)
        scores = jnp.einsum("btd,kvd->btkv", states, weight, preferred_element_type=jnp.float32)
        if self.head.bias is not None:
            bias = self.head.bias[...].astype(jnp.float32).reshape(1, 1, *weight.shape[:2])
            scores = scores + bias
        return constrain(scores, "batch", "tokens", "act_vocab", None)

    def new_state(
        self, batch: int, capacity: int, dtype: DTypeLike, *, sinks: int | None = None
    ) -> TransformerState:
        """Makes the state of `step` for `capacity` frames of `batch` sequences.

        Guidance keeps two states per sequence. `sinks` as for `Transformer.new_state`. Raises
        ValueError if the decoder is not causal, or has fewer learnt positions than `capacity`.
        """
        states = batch * (1 + self.config.is_guided)
        return self.transformer.new_state(states, capacity, dtype, sinks=sinks)

    def step(
        self,
        state: TransformerState,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        *,
        mask: Bool[Array, "B T"] | None = None,
    ) -> DecoderStep:
        """Decodes T further frames (one, or a prefix). Equals `__call__` on all frames at once.

        The cache must have T free positions; the caller counts them.
        """
        is_guided = self.config.is_guided
        x, mask = self._input(self._conditioning(hidden), codes, mask, is_guided=is_guided)
        x, state = self.transformer.extend(x, state, mask=mask)
        return DecoderStep(self.logits(self._guide(x) if is_guided else x), state)

    def _conditioning(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        if self.config.detach_input:
            hidden = jax.lax.stop_gradient(hidden)
        return hidden if self.projection is None else self.projection(hidden)

    def _drop_conditioning(
        self, x: Float[Array, "B T W"], rngs: Key[Array, " B"] | None
    ) -> Float[Array, "B T W"]:
        """Zeroes the hidden states of some training sequences, each drawn from its own key."""
        rate, guidance_rngs = self.config.cfg_unconditional_prob, fold_rngs(rngs, _GUIDANCE_RNG)
        if not rate or guidance_rngs is None:
            return x
        is_dropped = jax.vmap(lambda key: jax.random.bernoulli(key, rate))(guidance_rngs)
        return jnp.where(is_dropped[:, None, None], jnp.zeros((), x.dtype), x)

    def _input(
        self,
        x: Float[Array, "B T W"],
        codes: Int[Array, "B T K"] | None,
        mask: Bool[Array, "B T"] | None,
        *,
        is_guided: bool,
    ) -> tuple[Float[Array, "C T W"], Bool[Array, "C T"] | None]:
        """Adds the code embeddings.

        With `is_guided` the batch doubles: sequence b becomes 2b, and 2b + 1 without hidden states.
        Interleaved, both stay on one device.
        """
        has_codes = self.config.cond_on_prev_audio_tokens
        embedded = self.embed(codes).astype(x.dtype) if has_codes else None
        if is_guided:
            pairs = jnp.stack([x, jnp.zeros_like(x)], axis=1)
            x = pairs if embedded is None else pairs + embedded[:, None]
            x = x.reshape(-1, *x.shape[2:])
            return x, None if mask is None else jnp.repeat(mask, 2, axis=0)
        return (x if embedded is None else x + embedded), mask

    def _guide(self, x: Float[Array, "C T W"]) -> Float[Array, "B T W"]:
        """Mixes every pair: (1 - s) * without + s * with hidden states, s = cfg_scale."""
        scale = self.config.cfg_scale
        pairs = x.astype(jnp.float32).reshape(-1, 2, *x.shape[1:])
        return ((1.0 - scale) * pairs[:, 1] + scale * pairs[:, 0]).astype(x.dtype)


def _reorder(x: Array, order: np.ndarray) -> Array:
    """Reorders time in [B, T, ...], which is not sharded along time."""
    x = constrain(x, "batch", *(None,) * (x.ndim - 1))
    return jnp.take(x, order, axis=1)
