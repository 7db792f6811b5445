"""The golden checkpoints, and the networks that they describe."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.readers.source import TensorSource
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import VariableInfo, abstract, describe
from speechlm2_jax.networks.salm import Salm, SalmConfig
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.settings import build

DATA = Path(__file__).parents[1] / "data"
SALM = DATA / "salm"
NAMES = ("llama_adapter", "qwen3_lora")


def config_json(name: str) -> dict[str, Any]:
    return json.loads((SALM / f"{name}_hf/config.json").read_text())


def llm_directory(name: str) -> Path:
    return SALM / config_json(name)["pretrained_llm"]


def salm_config(name: str, *, lora: bool = True) -> SalmConfig:
    cfg = config_json(name)
    return SalmConfig(
        llm=decoder_config(json.loads((llm_directory(name) / "config.json").read_text())),
        perception=build(PerceptionConfig, cfg["perception"], "model.perception"),
        lora=build(LoraConfig, cfg["lora"], "model.lora") if lora and "lora" in cfg else None,
    )


def salm_infos(config: SalmConfig) -> dict[str, VariableInfo]:
    return describe(abstract(lambda rngs: Salm(config, rngs=rngs)))


def tensors(source: TensorSource) -> dict[str, np.ndarray]:
    return {name: source.read(name) for name in source.infos}


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and bytes are equal."""
    assert set(actual) == set(expected)
    for name, x in expected.items():
        y = np.asarray(actual[name])
        assert (y.dtype, y.shape) == (x.dtype, x.shape), name
        assert y.tobytes() == x.tobytes(), name
