"""Linear layers and embeddings with quantized weights, in place of those of a module."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from speechlm2_jax.layers.linear import Embedding, Linear
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.layers.quantized import DTYPES, SCALE_DTYPE, quantize

M = TypeVar("M", bound=nnx.Module)
SCALE_SUFFIX = "_scale"
"""Of the path of a weight's scales: "mlp.up.weight" has "mlp.up.weight_scale"."""


def quantize_module(module: M, kind: str) -> M:
    """Quantizes the weight of every `Linear` and `Embedding` in a module; returns the module.

    A layer gets a `weight_scale` [out], sharded as the outputs of its weight. LoRA, biases and
    norms stay as they are. Stacks and abstract modules work alike. Both new variables keep their
    dtype, whatever the activations have.
    """
    for _, layer in list(nnx.iter_modules(module)):
        if isinstance(layer, Linear | Embedding):
            _quantize_layer(layer, kind)
    return module


def _quantize_layer(layer: Linear | Embedding, kind: str) -> None:
    metadata = layer.weight.get_metadata()
    made = quantize(layer.weight[...], DTYPES[kind], SCALE_DTYPE)
    layer.weight = nnx.Param(made.values, **{**metadata, "keeps_dtype": True})
    axes = metadata["axes"][:-1]
    scale = nnx.Param(made.scales[..., 0], axes=axes, keeps_dtype=True)
    layer.weight_scale = nnx.data(scale)  # data: the attribute was None


def scale_path(path: str) -> str:
    """The path of the scales of a weight."""
    return path + SCALE_SUFFIX


def quantized_paths(infos: Mapping[str, VariableInfo]) -> list[str]:
    """Paths of the weights that are quantized."""
    return [path for path in infos if scale_path(path) in infos]


def unquantized(infos: Mapping[str, VariableInfo]) -> dict[str, VariableInfo]:
    """The variables that the same network has without quantization, as checkpoints store them."""
    weights = quantized_paths(infos)
    scales = {scale_path(path) for path in weights}
    plain = {path: info for path, info in infos.items() if path not in scales}
    fp32 = jnp.dtype(jnp.float32)
    return plain | {p: replace(infos[p], dtype=fp32, keeps_dtype=False) for p in weights}
