"""A model whose LoRA adapters are part of its weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from speechlm2_jax.layers.lora import merge_lora
from speechlm2_jax.layers.module import Variables, abstract, describe
from speechlm2_jax.parameter_paths import matching
from speechlm2_jax.pretrained.blueprint import Blueprint, parameter_names

B = TypeVar("B", bound=Blueprint)
LORA = "lora"
"""Key of the `model:` block."""
PATTERNS = ("freeze_params", "prevent_freeze_params")


def merged(blueprint: B, variables: Variables, dtype: str | None = None) -> tuple[B, Variables]:
    """The same model without LoRA: each adapter is added to its weight, W + scale * B A.

    The sums are computed in fp32. Without `dtype` they are rounded to the dtype of the weight; with
    it they stay fp32, to be cast when they are written. Freeze patterns that match no parameter any
    more are left out. A model without LoRA is returned unchanged.
    """
    lora = blueprint.network.lora
    if lora is None:
        return blueprint, variables
    plain = replace(blueprint, network=replace(blueprint.network, lora=None))
    names = parameter_names(plain, describe(abstract(plain.make)))
    patterns = {key: tuple(matching(getattr(plain.config, key), names)) for key in PATTERNS}
    config: Any = replace(cast(Any, plain.config), lora=None, **patterns)
    named = None if plain.named is None else _without_lora(plain.named, patterns)
    return replace(
        plain,
        config=config,
        cfg=_without_lora(plain.cfg, patterns),
        named=named,
    ), merge_lora(variables, lora, None if dtype is None else "float32")


def _without_lora(
    cfg: Mapping[str, Any], patterns: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    own = {key: list(value) for key, value in patterns.items() if key in cfg}
    return {key: value for key, value in cfg.items() if key != LORA} | own
