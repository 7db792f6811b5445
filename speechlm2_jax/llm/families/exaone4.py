"""EXAONE 4.0: norms behind attention and feed-forward; no rotation in layers without window."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import FULL, SLIDING, Attributes, pattern_of
from speechlm2_jax.llm.families.errors import ConfigError, shown
from speechlm2_jax.llm.families.family import Family, Fields, common
from speechlm2_jax.llm.families.olmo2 import NAMES


def read(a: Attributes) -> Fields:
    """Reads config.json of an Exaone4ForCausalLM.

    Without sliding_window all layers attend to all, rotated; with it only those with a window are.
    """
    fields = common(a, default_eps=1e-5)
    window = a.optional_size("sliding_window", None if "sliding_window" in a.config else 4096)
    types = a.layer_types(_default_types(a, fields["layers"], window))
    kinds = [
        LayerKind(window=window) if kind == SLIDING else LayerKind(has_rope=window is None)
        for kind in types
    ]
    return fields | {
        "pattern": pattern_of(kinds),
        "rope": a.rope(),
        "block": "post",
        "qk_norm": "head",
    }


def _default_types(a: Attributes, layers: int, window: int | None) -> list[str]:
    """A number n: every n-th layer attends to all. A word: one letter per layer, L or G."""
    every = a.get("sliding_window_pattern", 4)
    if window is None:
        return [FULL] * layers
    if isinstance(every, str) and every and set(every) <= {"L", "G"}:
        letters = (every * layers)[:layers]
        return [SLIDING if letter == "L" else FULL for letter in letters]
    if isinstance(every, int) and every > 0:
        return [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    raise ConfigError(f"sliding_window_pattern={shown(every)} should be a number, or L and G")


FAMILY = Family(model_type="exaone4", architecture="Exaone4ForCausalLM", read=read, names=NAMES)
