"""A small speech decoder with weights that matter, and inputs for it."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from speechlm2_jax.layers.module import Variables, merge, split
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from speechlm2_jax.speech_decoder.decoder import SpeechDecoder

WIDTH, STEPS, CODEBOOKS, CODES = 12, 7, 4, 8
CONFIG = SpeechDecoderConfig(
    n_layers=2,
    d_model=16,
    d_ffn=24,
    sa_n_heads=4,
    kernel_size=3,
    apply_norm_out=True,
    max_length_causal_mask=16,
    use_learnable_pos_emb=True,
)
GUIDED = replace(CONFIG, cfg_unconditional_prob=0.5, cfg_scale=1.7)
DROPPING = replace(GUIDED, p_dropout=0.3, p_dropout_out=0.2)


def make(config: SpeechDecoderConfig) -> SpeechDecoder:
    return SpeechDecoder(
        config,
        input_width=WIDTH,
        codebooks=CODEBOOKS,
        codes_per_codebook=CODES,
        rngs=nnx.Rngs(0),
    )


def weights(config: SpeechDecoderConfig) -> tuple[Any, Variables]:
    """Fresh weights made ten times larger, so that every part shows in the scores."""
    graphdef, variables = split(make(config))
    is_small = {path: "norm" not in path and "code" not in path for path in variables}
    return graphdef, {p: 10.0 * v if is_small[p] else v for p, v in variables.items()}


def inputs(batch: int = 2, length: int = STEPS, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Hidden states and codes."""
    hidden = jax.random.normal(jax.random.key(seed), (batch, length, WIDTH))
    codes = jax.random.randint(jax.random.key(seed + 1), (batch, length, CODEBOOKS), 0, CODES)
    return hidden, codes


def sequence_rngs(batch: int = 2, seed: int = 5) -> jax.Array:
    return jax.random.split(jax.random.key(seed), batch)


@partial(jax.jit, static_argnames=("graphdef", "train", "remat"))
def scores(
    graphdef: Any, variables: Variables, hidden: jax.Array, codes: jax.Array, **how: Any
) -> jax.Array:
    return merge(graphdef, variables)(hidden, codes, **how)


def padded(
    hidden: jax.Array, codes: jax.Array, after: int, junk: float = jnp.nan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Appends `after` positions of `junk` to each sequence; also returns the padding mask."""
    batch, length = codes.shape[:2]
    after_them = ((0, 0), (0, after), (0, 0))
    mask = jnp.broadcast_to(jnp.arange(length + after)[None] < length, (batch, length + after))
    return jnp.pad(hidden, after_them, constant_values=junk), jnp.pad(codes, after_them), mask
