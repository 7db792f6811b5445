"""The speech decoder: an LLM's hidden states and the codes so far -> the next frame's codes.

NeMo's TransformerARSpeechDecoder. Per step: project the hidden state to the decoder's width, add
the mean embedding of the previous frame's K codes, run the transformer, score the codes of each
codebook. With classifier-free guidance (Ho and Salimans 2022) a share of the training rows sees
no hidden states, and evaluation goes beyond the difference that they make.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.dropout import fold_rngs
from speechlm2_jax.layers.linear import Embedding, Linear
from speechlm2_jax.layers.stack import RematPolicy, scan_layers, stack
from speechlm2_jax.sharding import constrain, time_order, unsharded_time
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from speechlm2_jax.speech_decoder.transformer import Transformer, TransformerState

_GUIDANCE_RNG, _TRANSFORMER_RNG = range(2)


class DecoderStep(NamedTuple):
    """Scores of the next codes, fp32, and what the decoder then remembers."""

    logits: Float[Array, "B T K V"]
    state: TransformerState


class SpeechDecoder(nnx.Module):
    """Scores K codebooks of V codes each (control codes included) on states of `input_width`."""

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
        """Scores the codes of every step in fp32: `logits` of `decode`, which explains the rest."""
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
        """Computes the states that the head scores, in the dtype of `hidden`.

        `codes` are those of the previous frame at each step (the delay code first); unread, and
        may be None, if the config does not condition on them. `mask` is True where a step is no
        padding. Evaluation mixes the states with and without `hidden` if the config is guided: the
        head is linear, so that scores mix alike. Training does not; there `rngs`, one per row,
        switch on dropout and the rows without `hidden`.

        On a mesh with a context axis the steps are those of `Sharding.time_order`. They are
        brought in order and rows shared out instead, as convolutions look at their neighbours.
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

        A gather per table keeps no [B, T, K, W], and its gradient writes each table once. Raises
        ValueError for another number of codebooks.
        """
        tables = self.code_embeddings
        if tables is None or codes is None or codes.shape[-1] != self.codebooks:
            raise ValueError(f"the speech decoder takes codes [B, T, {self.codebooks}]")

        def add(table: Embedding, total: Array, ids: Array) -> tuple[Array, None]:
            return total + table(ids).astype(jnp.float32), None

        start = jnp.zeros((*codes.shape[:2], self.config.d_model), jnp.float32)
        by_codebook = jnp.moveaxis(codes, -1, 0)  # [K, B, T]
        total, _ = scan_layers(tables, add, start, by_codebook, remat="none")
        return constrain(total / self.codebooks, "batch", "steps", "act_embed")

    def logits(self, states: Float[Array, "B T W"]) -> Float[Array, "B T K V"]:
        """Scores the codes of every codebook in fp32, whatever the dtype of `states`."""
        states = constrain(states, "batch", "steps", "act_embed")
        weight = constrain(self.head.weight[...].astype(states.dtype), "vocab", None)
        weight = weight.reshape(self.codebooks, -1, weight.shape[1])  # [K, V, W]
        weight = constrain(weight, "vocab", None, None)
        scores = jnp.einsum("btd,kvd->btkv", states, weight, preferred_element_type=jnp.float32)
        if self.head.bias is not None:
            bias = self.head.bias[...].astype(jnp.float32).reshape(1, 1, *weight.shape[:2])
            scores = scores + bias
        return constrain(scores, "batch", "steps", "act_vocab", None)

    def new_state(self, batch: int, capacity: int, dtype: Any) -> TransformerState:
        """Makes what `step` carries: room for `capacity` steps of `batch` rows.

        Guidance remembers every row twice. Raises ValueError if the decoder is not causal, or has
        fewer learnt positions than `capacity`.
        """
        return self.transformer.new_state(batch * (1 + self.config.is_guided), capacity, dtype)

    def step(
        self,
        state: TransformerState,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        *,
        mask: Bool[Array, "B T"] | None = None,
    ) -> DecoderStep:
        """Scores T further steps (one, or a prefix): equal to evaluation by `__call__` on all.

        The state must have T free slots, which the caller counts.
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
        """Training rows that see no hidden states, drawn each by its own key."""
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
        """Adds the codes; with `is_guided` row b becomes 2b, and 2b + 1 without hidden states.

        Pairs side by side stay on the device of their row.
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
        """(1 - s) x without + s x with hidden states, of every pair."""
        scale = self.config.cfg_scale
        pairs = x.astype(jnp.float32).reshape(-1, 2, *x.shape[1:])
        return ((1.0 - scale) * pairs[:, 1] + scale * pairs[:, 0]).astype(x.dtype)


def _reorder(x: Array, order: Any) -> Array:
    """Puts the steps [B, T, ...] of whole rows into another order."""
    x = constrain(x, "batch", *(None,) * (x.ndim - 1))
    return jnp.take(x, order, axis=1)
