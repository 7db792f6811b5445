"""NeMo's `model:` block of a SALM -> `SalmBlueprint`: components and architecture."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from speechlm2_jax.asr.transducer import TransducerConfig
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion import salm as salm_tables
from speechlm2_jax.data.prompts import PromptError, PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError
from speechlm2_jax.networks.salm import Salm, SalmConfig
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.pretrained.blueprint import Blueprint
from speechlm2_jax.pretrained.components import (
    LlmFiles,
    find_asr,
    find_llm,
    perception_config,
    read_lora,
)
from speechlm2_jax.pretrained.llm_files import llm_generation_config
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.pretrained.salm_config import SalmModelConfig
from speechlm2_jax.settings import SettingsError, build


@dataclass(frozen=True, kw_only=True)
class SalmBlueprint(Blueprint):
    """Everything of a SALM but its weights."""

    config: SalmModelConfig
    network: SalmConfig
    formatter: PromptFormatter
    placeholder_id: int
    end_ids: tuple[int, ...]
    """Tokens that end a response: the tokenizer's, the LLM's, those of its chat template."""
    generation_defaults: Mapping[str, object]
    """The LLM's generation_config.json, or nothing."""

    @property
    def table(self) -> mapping.Table:
        """NeMo's parameter names of the whole model."""
        return salm_tables.salm_table(self.network, automodel=self.config.use_nemo_automodel)

    def make(self, rngs: nnx.Rngs) -> Salm:
        """Makes the network."""
        return Salm(self.network, rngs=rngs)


def read_blueprint(cfg: Mapping[str, object], near: tuple[Path, ...] = ()) -> SalmBlueprint:
    """Reads configs and tokenizer, no weights. Raises SettingsError with the key to change."""
    config = build(SalmModelConfig, cfg, "model")
    location = Location(near=near)
    llm = find_llm(config, location)
    asr_file = find_asr(config, location)
    perception = perception_config(config.perception, asr_file, llm.decoder.width)
    fields = blueprint_fields(config, cfg, llm, perception)
    return SalmBlueprint(**fields, asr_file=asr_file, near=near)


def blueprint_fields(
    config: SalmModelConfig,
    cfg: Mapping[str, Any],
    llm: LlmFiles,
    speech: tuple[Mapping[str, Any], PerceptionConfig],
    asr: TransducerConfig | None = None,
) -> dict[str, Any]:
    """The fields of a blueprint for an LLM and a perception block, as written and as read."""
    tokenizer = Tokenizer(llm.tokenizer)
    tokenizer.add_special_tokens([config.audio_locator_tag])
    placeholder_id = tokenizer.require(config.audio_locator_tag, "model.audio_locator_tag")
    formatter = prompt_formatter(config.prompt_format, tokenizer)
    tokenizer.limit_ids(llm.decoder.vocab_size, [placeholder_id])
    defaults = llm_generation_config(llm.directory) or {}
    block, perception = speech
    lora = read_lora(config, llm.decoder)
    try:
        if config.encoder_chunk_size_seconds is not None:
            seconds = config.encoder_chunk_size_seconds
            perception = replace(perception, encoder_chunk_size_seconds=seconds)
        network = SalmConfig(llm=llm.decoder, perception=perception, lora=lora, asr=asr)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"model: {error}") from error
    return {
        "config": config,
        "cfg": {**cfg, "prompt_format": formatter.name, "perception": block},
        "llm_config": llm.config,
        "tokenizer": tokenizer,
        "formatter": formatter,
        "placeholder_id": placeholder_id,
        "end_ids": end_ids(llm, defaults, formatter),
        "generation_defaults": defaults,
        "pad_id": tokenizer.pad_id,
        "network": network,
        "llm_directory": llm.directory,
    }


def prompt_formatter(name: str | None, tokenizer: Tokenizer) -> PromptFormatter:
    """The prompt format of a model. Raises SettingsError that begins with the key to change."""
    try:
        return PromptFormatter(name, tokenizer)
    except (PromptError, TokenizerError) as error:
        raise SettingsError(f"model.prompt_format: {error}") from error


def end_ids(
    llm: LlmFiles, defaults: Mapping[str, object], formatter: PromptFormatter
) -> tuple[int, ...]:
    """The end tokens that the tokenizer, the LLM's two config files and its chat template name."""
    named: list[Any] = [formatter.tokenizer.eos_id]
    for file in (defaults, llm.config):
        value = file.get("eos_token_id")
        named += value if isinstance(value, list) else [value]
    in_table = range(llm.decoder.vocab_size)
    ids = [i for i in (*named[1:], *formatter.end_ids) if type(i) is int and i in in_table]
    return tuple(dict.fromkeys([i for i in named[:1] if i is not None] + ids))
