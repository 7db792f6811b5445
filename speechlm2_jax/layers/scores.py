"""How products of queries and keys become attention scores."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


def capped(scores: Float[Array, "*any"], softcap: float | None) -> Float[Array, "*any"]:
    """Computes softcap * tanh(scores / softcap), between -softcap and softcap; None: no bound."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scale, bound and window of attention scores."""

    scale: float
    softcap: float | None = None
    """Bound by tanh (Gemma 2)."""
    window: int | None = None
    """A query scores keys less than so many positions before it; None: all before it."""

    def of(self, products: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """Scales and bounds products of queries and keys."""
        return capped(products * self.scale, self.softcap)
