# pyright: basic
"""Rotary settings of a GGUF file -> rope_scaling of config.json.

Llama 3's scaling is stored as one divisor per frequency (`rope_freqs.weight`), not by its four
numbers. They are found again, and give the stored divisors, or the file is refused.
"""

import math
from typing import Any

import numpy as np

from speechlm2_jax.conversion.gguf.hyperparameters import Hyperparameters
from speechlm2_jax.layers.rope import Llama3Scaling

ROPE_FREQS = "rope_freqs.weight"
LENGTHS = (8192, *(1 << power for power in range(4, 21)))
"""Original lengths that are tried first, Llama's own before the others."""
USUAL_HIGH = 4.0
"""high_freq_factor where low_freq_factor is 1, in Llama 3.1, 3.2 and 3.3."""
TOLERANCE = 1e-5
"""Relative, of divisors that were computed in float32."""
YARN = "yarn"
NEUTRAL_YARN = {
    "yarn_ext_factor": (-1.0, 1.0),
    "yarn_attn_factor": (1.0,),
    "attn_factor": (0.0, 1.0),
    "yarn_log_multiplier": (0.0,),
    "alpha": (0.0, 1.0),
}
"""Numbers whose meaning differs from transformers' -> the values that change nothing."""


def rope_scaling(
    keys: Hyperparameters, theta: float, divisors: np.ndarray | None
) -> dict[str, Any] | None:
    """The block rope_scaling of config.json; None for plain rotation.

    `divisors` is `rope_freqs.weight`, [F]. Raises ConversionError for a scaling that transformers
    has not.
    """
    scaling = _of_keys(keys)
    if divisors is None or np.all(divisors == 1):
        return scaling
    if scaling is not None:
        raise keys.error(f"{ROPE_FREQS} and {keys.name('rope.scaling.type')} scale both")
    found = find_llama3(divisors.astype(np.float64), theta)
    if found is None:
        raise keys.error(
            f"{ROPE_FREQS} holds divisors of the rotary frequencies that are not those of "
            "Llama 3's scaling, the only one that is supported"
        )
    return found


def _of_keys(keys: Hyperparameters) -> dict[str, Any] | None:
    """Linear and YaRN, by the keys `rope.scaling.*`."""
    factor = keys.optional_number("rope.scaling.factor")
    older = keys.optional_number("rope.scale_linear")
    if factor is None:
        factor = older
    keys.get("rope.scaling.finetuned")  # tells how it was trained; the rotation is the same
    kind = keys.get("rope.scaling.type", "none" if factor is None else "linear")
    for name, neutral in NEUTRAL_YARN.items():
        value = keys.get(f"rope.scaling.{name}", neutral[0])
        if value not in neutral:
            raise keys.error(f"{keys.name(f'rope.scaling.{name}')}={value} is not supported")
    length = keys.get("rope.scaling.original_context_length")
    if kind == "none" or factor in (None, 1.0):
        if kind not in ("none", "linear", YARN):
            raise keys.error(f"{keys.name('rope.scaling.type')} {kind!r} is not supported")
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != YARN or length is None:
        raise keys.error(
            f"{keys.name('rope.scaling.type')} {str(kind)[:40]!r} is not supported; linear and "
            "yarn with its original_context_length are"
        )
    block = {"rope_type": YARN, "factor": factor, "original_max_position_embeddings": length}
    for name in ("beta_fast", "beta_slow"):
        value = keys.optional_number(f"rope.scaling.yarn_{name}")
        block |= {} if value is None else {name: value}
    return block


def find_llama3(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The four numbers of Llama 3's scaling that give these divisors, [F]; None if none do.

    Only the ratios of the original length to the two factors count, so low_freq_factor is 1.
    """
    factor = float(divisors.max())
    plain = _frequencies(len(divisors), theta)
    usual = [(USUAL_HIGH, length) for length in LENGTHS]
    for high, length in (*usual, *_fitted(divisors, theta)):
        if not (1 < factor < math.inf and high > 1 and 1 <= length < 1 << 30):
            continue
        scaling = Llama3Scaling(
            factor=factor, low_freq_factor=1.0, high_freq_factor=high, original_positions=length
        )
        if np.allclose(plain / scaling.scale(plain, theta), divisors, rtol=TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    return None


def _fitted(divisors: np.ndarray, theta: float) -> list[tuple[float, int]]:
    """high_freq_factor and original length L, from the divisors between 1 and the largest.

    A frequency of t turns per position keeps (L * t - 1) / (high - 1) of itself, a line over t.
    """
    factor = float(divisors.max())
    between = (divisors > 1 + TOLERANCE) & (divisors < factor * (1 - TOLERANCE))
    if between.sum() < 2:
        return []
    turns = _frequencies(len(divisors), theta)[between] / (2 * math.pi)
    kept = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(turns, kept, 1)
    if not (offset < 0 < slope and math.isfinite(slope / offset)):
        return []
    high, length = 1 - 1 / offset, -slope / offset
    return [(float(round(high, 3)), round(length)), (float(high), round(length))]


def _frequencies(count: int, theta: float) -> np.ndarray:
    """theta^(-i / count), in radians per position."""
    return theta ** (-np.arange(count) / count)
