"""Rotary settings of config.json -> RopeConfig, closed: every key is honoured or refused.

Defaults of missing keys are those of Hugging Face's `modeling_rope_utils`.
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from speechlm2_jax.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from speechlm2_jax.llm.families.errors import ConfigError, finite, shown

Json = Mapping[str, Any]
LENGTH = "original_max_position_embeddings"


@dataclass(frozen=True, kw_only=True)
class RopeDialect:
    """What a family adds to the rotary settings of its config.json."""

    interleaved: bool = False
    """Pairs are neighbours."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Older names of a rope_type."""
    others: tuple[str, ...] = ()
    """Keys of the block that the family reads itself."""
    default: Json = field(default_factory=dict)
    """The block where config.json has none."""


def read_rope(
    config: Json,
    *,
    theta: float,
    part: float | None,
    head_width: int,
    kind: str | None = None,
    dialect: "RopeDialect",
) -> tuple[RopeConfig, Set[str]]:
    """Reads rope_parameters (transformers 5), or rope_theta and rope_scaling (4).

    `theta` and `part` (of each head that is rotated) are the family's defaults; None: the family
    rotates whole heads. `kind` names the block of a kind of layer, where rope_parameters has one
    for each. Returns also the names of the attributes that were read. Raises ConfigError where both
    dialects are there and mean different rotations: versions of transformers differ in which of
    them they take.
    """
    blocks: list[Json] = []
    for name in ("rope_parameters", "rope_scaling"):
        block = config.get(name)
        if isinstance(block, Mapping) and kind is not None and kind in block:
            block = block[kind]
        elif kind is not None and block and name == "rope_parameters":
            raise ConfigError(
                f"rope_parameters={shown(block)} should have a block for each kind of layer, as "
                f"{kind}; transformers reads no other"
            )
        if not isinstance(block, Mapping | None):
            raise ConfigError(f"rotary settings {shown(block)} are no mapping")
        blocks.append({**(block or {})})
    new, old = blocks
    defaults = {
        "rope_theta": _first(config.get("rope_theta"), theta),
        "partial_rotary_factor": _first(config.get("partial_rotary_factor"), part, 1.0),
    }
    reader = _Reader(config, head_width, dialect, is_partial=part is not None)
    rope = reader.rope(defaults | _given(new or old or dialect.default))
    if new and old:
        inherited = {key: new[key] for key in defaults if new.get(key) is not None}
        if reader.rope(defaults | inherited | _given(old)) != rope:
            raise ConfigError(
                f"rope_parameters {shown(new)} and rope_scaling {shown(old)} differ; delete the "
                "one that does not apply"
            )
    names = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
    return rope, names | reader.read


class _Reader:
    """One block of rotary settings, with the attributes around it."""

    def __init__(self, config: Json, head_width: int, dialect: RopeDialect, *, is_partial: bool):
        self.config = config
        self.head_width = head_width
        self.dialect = dialect
        self.is_partial = is_partial
        self.read: set[str] = set()
        self.block: dict[str, Any] = {}

    def rope(self, block: Json) -> RopeConfig:
        self.block = {k: v for k, v in block.items() if k not in self.dialect.others}
        theta = finite("rope_theta", self.block.pop("rope_theta"), may_be_zero=False)
        part = finite("partial_rotary_factor", self.block.pop("partial_rotary_factor"))
        width = int(self.head_width * part)
        if width != self.head_width and not self.is_partial:
            raise ConfigError(
                f"partial_rotary_factor={part}: this family has no rotary positions on a part of "
                "each head"
            )
        kinds = {self.block.pop(key, None) for key in ("rope_type", "type")} - {None}
        name = str(kinds.pop()) if kinds else "default"
        name = self.dialect.aliases.get(name, name)
        if kinds or name not in SCALINGS:
            raise ConfigError(
                f"rotary scaling {name!r} is not supported; choose among {', '.join(SCALINGS)}"
            )
        scaling = SCALINGS[name](self)
        if name == "default" and self.block.get("factor") == 1:
            self.block.pop("factor")
        if name in ("default", "linear", "dynamic"):
            self.block.pop(LENGTH, None)  # unused by these
        if self.block:
            raise ConfigError(
                f"rotary scaling {name!r} has keys that are not known here: "
                f"{', '.join(sorted(map(str, self.block)))}"
            )
        return RopeConfig(
            theta=theta,
            scaling=scaling,
            width=None if width == self.head_width else width,
            interleaved=self.dialect.interleaved,
        )

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0 of the block. Raises ConfigError if it is missing without default."""
        value = self.block.pop(key, None)
        if value is None and default is None:
            raise ConfigError(f"rotary scaling {shown(self.block)}: {key} is missing")
        return finite(key, _first(value, default), may_be_zero=False)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers above 0 of the block."""
        given = self.block.pop(key, None)
        if not isinstance(given, list | tuple):
            raise ConfigError(f"rotary scaling: {key}={shown(given)} should be a list of numbers")
        return tuple(finite(key, value, may_be_zero=False) for value in given)

    def length(self, *, is_required: bool = False) -> int:
        """The length before rescaling: the block's, the config's, or that of the model."""
        outer, own = self.config.get(LENGTH), self.block.pop(LENGTH, None)
        self.read.add(LENGTH)
        if outer is not None and own is not None and outer != own:
            raise ConfigError(
                f"{LENGTH}={shown(outer)}, but the rotary scaling names another length, {own}"
            )
        default = None if is_required else self.config.get("max_position_embeddings")
        value = _first(outer, own, default)
        if value is None:
            raise ConfigError(f"rotary scaling: {LENGTH} is missing")
        return int(finite(LENGTH, value, may_be_zero=False))

    def factor(self, length: int) -> float:
        """The stretch: the block's, or the ratio of the model's length to the one before."""
        value = self.block.pop("factor", None)
        if value is None:
            value = self.config.get("max_position_embeddings", length) / length
        return finite("factor", value, may_be_zero=False)


def _linear(block: _Reader) -> RopeScaling:
    return LinearScaling(factor=block.number("factor"))


def _llama3(block: _Reader) -> RopeScaling:
    try:
        return Llama3Scaling(
            factor=block.number("factor"),
            low_freq_factor=block.number("low_freq_factor"),
            high_freq_factor=block.number("high_freq_factor"),
            original_positions=block.length(is_required=True),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _dynamic(block: _Reader) -> RopeScaling:
    positions = block.config.get("max_position_embeddings")
    if positions is None:
        raise ConfigError("rotary scaling 'dynamic': max_position_embeddings is missing")
    return DynamicScaling(factor=block.number("factor"), original_positions=int(positions))


def _yarn(block: _Reader) -> RopeScaling:
    length = block.length()
    factor = block.factor(length)
    attention = block.block.pop("attention_factor", None)
    scales = [block.block.pop(key, None) for key in ("mscale", "mscale_all_dim")]

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if attention is None:
        named = all(scales)
        attention = magnitude(scales[0]) / magnitude(scales[1]) if named else magnitude(1.0)
    return YarnScaling(
        factor=factor,
        original_positions=length,
        attention_factor=finite("attention_factor", attention),
        beta_fast=block.number("beta_fast", 32.0),
        beta_slow=block.number("beta_slow", 1.0),
        truncate=bool(_first(block.block.pop("truncate", None), True)),
    )


def _longrope(block: _Reader) -> RopeScaling:
    length = block.length()
    factor = block.factor(length)
    attention = block.block.pop("attention_factor", None)
    if attention is None:
        ratio = math.log(factor) / math.log(length) if factor > 1 else 0.0
        attention = math.sqrt(1 + ratio)
    return LongRopeScaling(
        short_factor=block.numbers("short_factor"),
        long_factor=block.numbers("long_factor"),
        original_positions=length,
        attention_factor=finite("attention_factor", attention),
    )


SCALINGS: Mapping[str, Callable[[_Reader], RopeScaling | None]] = MappingProxyType(
    {
        "default": lambda block: None,
        "linear": _linear,
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
)
"""rope_type -> what reads its keys."""


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _given(block: Json) -> dict[str, Any]:
    return {key: value for key, value in block.items() if value is not None}
