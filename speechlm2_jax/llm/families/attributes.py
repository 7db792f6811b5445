"""Hugging Face's config.json, read attribute by attribute; what nobody read is checked by lists.

Both dialects are read: transformers 4 (`rope_theta` + `rope_scaling`, `torch_dtype`) and 5
(`rope_parameters`, `dtype`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from speechlm2_jax.layers.rope import RopeConfig
from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.errors import ConfigError, finite, shown
from speechlm2_jax.llm.families.rotary import RopeDialect, read_rope

Json = Mapping[str, Any]
LARGEST = MappingProxyType(
    {
        "vocab_size": 1 << 26,
        "hidden_size": 1 << 20,
        "num_hidden_layers": 1 << 12,
        "num_attention_heads": 1 << 16,
        "num_key_value_heads": 1 << 16,
        "head_dim": 1 << 16,
        "intermediate_size": 1 << 22,
    }
)
DEFAULT_LARGEST = 1 << 30
"""Sizes beyond these are mistakes: building such a network would fill any memory."""
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


class Attributes:
    """One config.json. `read` holds the names that a family has asked for."""

    def __init__(self, config: Json):
        self.config = config
        self.read: set[str] = set()

    def get(self, key: str, default: object = None) -> Any:
        """Returns a value; missing and null mean the default."""
        self.read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a whole number within the bounds of any LLM.

        Raises ConfigError for another value, or if it is missing and has no default.
        """
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{key}={shown(value)} should be a whole number")
        largest = LARGEST.get(key, DEFAULT_LARGEST)
        if not 1 <= value <= largest:
            raise ConfigError(f"{key}={shown(value)} is not a size of an LLM (1 to {largest})")
        return value

    def optional_size(self, key: str, default: int | None = None) -> int | None:
        """Returns a whole number, or None if it is missing and has no default."""
        return None if self.get(key, default) is None else self.size(key, default)

    def number(self, key: str, default: float, *, may_be_zero: bool = True) -> float:
        """Returns a finite number that is not negative. Raises ConfigError for another value."""
        return finite(key, self.get(key, default), may_be_zero=may_be_zero)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """Returns a number above zero, or None if it is missing and has no default."""
        value = self.get(key, default)
        return None if value is None else finite(key, value, may_be_zero=False)

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns a truth value. Raises ConfigError for another value."""
        value = self.get(key, default)
        if not isinstance(value, bool | int):
            raise ConfigError(f"{key}={shown(value)} should be true or false")
        return bool(value)

    def word(self, key: str, default: str) -> str:
        """Returns a text."""
        return str(self.get(key, default))

    def head_width(self, default: int | None = None) -> int:
        """Returns the width of each head: head_dim, or else the width shared by the heads."""
        shared = self.size("hidden_size") // self.size("num_attention_heads")
        return self.size("head_dim", default or max(shared, 1))

    def layer_types(self, default: Sequence[str]) -> list[str]:
        """Returns the kind of attention of each layer. Raises ConfigError for one not supported."""
        given = self.get("layer_types")
        layers = self.size("num_hidden_layers")
        if given is None:
            return list(default)
        if not isinstance(given, list | tuple) or len(given) != layers:
            raise ConfigError(f"layer_types should be a list of {layers} names, one per layer")
        unknown = {str(kind) for kind in given} - {FULL, SLIDING, CHUNKED}
        if unknown:
            raise ConfigError(
                f"layer_types: {', '.join(sorted(unknown))} is not supported; supported are "
                f"{FULL}, {SLIDING} and {CHUNKED}"
            )
        return list(given)

    def rope(
        self,
        *,
        theta: float = 10000.0,
        kind: str | None = None,
        part: float | None = None,
        head_width: int | None = None,
        **dialect: Any,
    ) -> RopeConfig:
        """Reads rope_parameters (transformers 5), or rope_theta and rope_scaling (4).

        `theta` and `part` are the family's defaults; `kind` names the block of one kind of layer
        where rope_parameters has one for each; `dialect` are the fields of `rotary.RopeDialect`.
        """
        rope, read = read_rope(
            self.config,
            theta=theta,
            kind=kind,
            part=part,
            head_width=head_width or self.head_width(),
            dialect=RopeDialect(**dialect),
        )
        self.read |= read
        return rope


def pattern_of(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """Returns the shortest pattern that, repeated from the first layer on, gives these kinds."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return (LayerKind(),)
