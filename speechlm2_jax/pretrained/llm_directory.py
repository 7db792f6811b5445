"""Writes a model's LLM alone: the plain Hugging Face directory that transformers reads."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from speechlm2_jax.conversion import hf_config, mapping
from speechlm2_jax.conversion.casting import cast_source, main_dtype
from speechlm2_jax.conversion.decoder import PEFT_PREFIX, decoder_table, layers_table
from speechlm2_jax.conversion.readers import TensorSource
from speechlm2_jax.conversion.writers.shards import write_shards
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.lora import merge_lora as merge_adapters
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.llm.families import FAMILIES
from speechlm2_jax.pretrained.blueprint import Blueprint
from speechlm2_jax.pretrained.licences import CARD
from speechlm2_jax.pretrained.locate import GENERATION_CONFIG
from speechlm2_jax.pretrained.model_card import CardInput, model_card
from speechlm2_jax.pretrained.registry import CONFIG
from speechlm2_jax.pretrained.save_load import SaveOptions, write_json
from speechlm2_jax.settings import to_plain

ADAPTER = "adapter"
"""Folder beside the LLM that holds its LoRA, if that is not merged."""
ROOT = "llm."
ADAPTERS = ("lora_a", "lora_b")


def save_llm(
    directory: Path,
    blueprint: Blueprint,
    variables: Variables,
    options: SaveOptions,
) -> None:
    """Writes config.json, weights, tokenizer, generation_config.json and a card of the LLM.

    LoRA is merged, or else written to the folder `adapter` as PEFT saves it. Weights above 5 GB
    are sharded. Raises ConversionError for values that the dtype cannot hold.
    """
    dtype, merge_lora = options.dtype, options.merge_lora
    network = blueprint.network
    own = llm_variables(variables)
    base = _base(own, network.lora if merge_lora else None, dtype)
    source = cast_source(mapping.export_source(base, decoder_table(network.llm)), dtype)
    write_shards(directory, source)
    if network.lora is not None and not merge_lora:
        _save_adapter(directory / ADAPTER, blueprint, own, dtype)
    write_json(directory / CONFIG, llm_config(blueprint, source))
    if blueprint.generation_config is not None:
        write_json(directory / GENERATION_CONFIG, blueprint.generation_config)
    blueprint.tokenizer.save(directory)
    card = CardInput(
        blueprint=blueprint,
        variables=variables,
        dtype=main_dtype(source),
        merged=network.lora if merge_lora else None,
        is_llm=True,
        name=options.name,
    )
    (directory / CARD).write_text(model_card(card), encoding="utf-8")


def llm_variables(variables: Variables, *, with_lora: bool = True) -> Variables:
    """The LLM's variables, by their paths inside it."""
    own = {p.removeprefix(ROOT): v for p, v in variables.items() if p.startswith(ROOT)}
    return {path: v for path, v in own.items() if with_lora or not path.endswith(ADAPTERS)}


def llm_config(blueprint: Blueprint, source: TensorSource) -> dict[str, Any]:
    """The LLM's config.json for the tensors of `source`: plain weights of one dtype."""
    architecture = FAMILIES[blueprint.network.llm.family].architecture
    config = hf_config.of_plain_weights(blueprint.llm_config, main_dtype(source))
    return {**config, "architectures": [architecture]}


def _base(llm: Variables, lora: LoraConfig | None, dtype: str | None) -> Variables:
    """The LLM's variables without adapters, which are merged if `lora` is given."""
    if lora is not None:
        # fp32, so that the cast to `dtype` is the only rounding and checks the range
        return merge_adapters(llm, lora, None if dtype is None else "float32")
    return {path: value for path, value in llm.items() if not path.endswith(ADAPTERS)}


def _save_adapter(directory: Path, blueprint: Blueprint, llm: Variables, dtype: str | None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors."""
    assert blueprint.network.lora is not None
    lora: LoraConfig = blueprint.network.lora.as_peft()
    rules = [
        replace(rule, source=PEFT_PREFIX + rule.source.replace(".default.weight", ".weight"))
        for rule in layers_table(blueprint.network.llm, lora).rules
        if rule.target.endswith(ADAPTERS)
    ]
    own = {path: value for path, value in llm.items() if path.endswith(ADAPTERS)}
    source = mapping.export_source(own, mapping.Table(tuple(rules)))
    write_shards(directory, cast_source(source, dtype), stem="adapter_model")
    write_json(directory / "adapter_config.json", peft_config(lora))


def peft_config(lora: LoraConfig) -> Mapping[str, Any]:
    """PEFT's adapter_config.json of an adapter that is to be used, not trained."""
    plain: dict[str, Any] = to_plain(lora)
    return {
        **plain,
        "target_modules": sorted(lora.target_modules or ()),
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
