"""Families of decoder LLMs by Hugging Face's model_type: one file each."""

from collections.abc import Mapping
from types import MappingProxyType

from speechlm2_jax.llm.families import (
    apertus,
    arcee,
    cohere2,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3_text,
    glm,
    glm4,
    granite,
    helium,
    hunyuan_v1_dense,
    llama,
    ministral,
    ministral3,
    mistral,
    nemotron,
    olmo2,
    olmo3,
    phi,
    phi3,
    qwen2,
    qwen3,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from speechlm2_jax.llm.families.family import Family

_MODULES = (
    llama,
    qwen2,
    qwen3,
    mistral,
    ministral,
    ministral3,
    gemma,
    gemma2,
    gemma3_text,
    phi,
    phi3,
    granite,
    smollm3,
    nemotron,
    olmo2,
    olmo3,
    glm,
    glm4,
    cohere2,
    arcee,
    apertus,
    seed_oss,
    ernie4_5,
    exaone4,
    helium,
    hunyuan_v1_dense,
    stablelm,
    starcoder2,
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
)
"""model_type -> family."""
