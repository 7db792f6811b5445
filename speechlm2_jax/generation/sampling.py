"""Greedy choice or sampling of the next token, with the semantics of Hugging Face's options."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.generation.warpers import keep_top_k, keep_top_p


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Greedy, or with `do_sample` sampling after temperature, top-k and top-p, in this order.

    Raises ValueError for values outside their range, if `do_sample` is True.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """Number of most likely tokens to keep; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if not self.do_sample:
            return
        if not self.temperature > 0.0:
            raise ValueError(f"temperature={self.temperature} must be positive; or do_sample=False")
        if self.top_k < -1:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 or -1 keeps every token")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be in [0, 1]; 1 keeps every token")


def choose(
    logits: Float[Array, "B V"], config: SamplingConfig, rngs: Key[Array, " B"] | None = None
) -> Int[Array, " B"]:
    """Chooses one token per example. A draw depends on the example's own logits and key only.

    Raises ValueError for `do_sample` without `rngs`.
    """
    logits = logits.astype(jnp.float32)
    if not config.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if rngs is None:
        raise ValueError("do_sample=True needs random keys: rngs, one per example")
    kept = warp(logits, config)
    return jax.vmap(jax.random.categorical)(rngs, kept).astype(jnp.int32)


def warp(logits: Float[Array, "B V"], config: SamplingConfig) -> Float[Array, "B V"]:
    """Divides by the temperature and sets the logits of truncated tokens to -inf."""
    logits = logits / config.temperature
    if config.top_k > 0:
        logits = keep_top_k(logits, config.top_k)
    return keep_top_p(logits, config.top_p) if config.top_p < 1.0 else logits
