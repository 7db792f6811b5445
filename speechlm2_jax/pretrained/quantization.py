"""What of a model is quantized: the weights of its LLM, and its KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import jax

from speechlm2_jax.layers.quantized import DTYPES, FP8, fp8_problem
from speechlm2_jax.layers.quantized_layers import quantize_module
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.pretrained.blueprint import Blueprint
from speechlm2_jax.settings import SettingsError

B = TypeVar("B", bound=Blueprint)
N = TypeVar("N", bound=Any)
KEY = "quantize_frozen_llm"
"""Key of the `model:` block."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """8-bit formats ("int8", "fp8") of a model's LLM; None: the dtype of the computation."""

    weights: str | None = None
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        for key, kind in (("quantize", self.weights), ("kv_cache_dtype", self.kv_cache)):
            if kind is not None and kind not in DTYPES:
                raise SettingsError(f"{key}: {kind!r} is not supported; use {' or '.join(DTYPES)}")

    def changed(self, weights: str | None, kv_cache: str | None) -> "Quantization":
        """The same with what is given. Raises SettingsError for weights of two formats."""
        if None not in (weights, self.weights) and weights != self.weights:
            raise SettingsError(
                f"quantize: the weights are {self.weights} already (as in training with "
                f"model.quantize_frozen_llm); leave quantize out, or set it to {self.weights}"
            )
        return Quantization(weights=weights or self.weights, kv_cache=kv_cache or self.kv_cache)

    def check_device(self, device: jax.Device) -> None:
        """Raises SettingsError for fp8 on a device that does not compute in it."""
        problem = fp8_problem(device) if FP8 in (self.weights, self.kv_cache) else None
        if problem is not None:
            key = "quantize" if self.weights == FP8 else "kv_cache_dtype"
            raise SettingsError(f"{key}: {problem}")

    def applied(self, network: N) -> N:
        """Gives the LLM of a network these formats; returns the network."""
        self.applied_to_llm(network.llm)
        return network

    def applied_to_llm(self, llm: Decoder) -> Decoder:
        """Gives an LLM these formats; returns it."""
        if self.weights is not None:
            quantize_module(llm, self.weights)
        llm.kv_cache_kind = self.kv_cache
        return llm


def unquantized_settings(blueprint: B) -> B:
    """The same model without `model.quantize_frozen_llm`."""
    config: Any = replace(cast(Any, blueprint.config), **{KEY: None})
    named = None if blueprint.named is None else _without_key(blueprint.named)
    return replace(blueprint, config=config, cfg=_without_key(blueprint.cfg), named=named)


def _without_key(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if key != KEY}
