"""Attention scores from the dot products of queries and keys."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


def capped(scores: Float[Array, "*any"], softcap: float | None) -> Float[Array, "*any"]:
    """Computes softcap * tanh(scores / softcap); returns the scores unchanged if it is None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scale, soft cap and window of attention scores."""

    scale: float
    softcap: float | None = None
    """Soft cap by tanh (Gemma 2)."""
    window: int | None = None
    """Sliding window: keys less than `window` positions before the query; None: all before it."""

    def of(self, dots: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """Scales and caps the dot products of queries and keys."""
        return capped(dots * self.scale, self.softcap)
