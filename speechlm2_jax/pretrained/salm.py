"""NeMo's `model:` block of a SALM -> `SalmBlueprint`: components and architecture."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from speechlm2_jax.conversion import hf_config, mapping
from speechlm2_jax.conversion import salm as salm_tables
from speechlm2_jax.conversion.readers import open_weights
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.networks.salm import Salm, SalmConfig
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.blueprint import (
    Blueprint,
    PretrainedWeights,
    infos_below,
    needs_asr,
    perception_config,
)
from speechlm2_jax.pretrained.locate import Location, read_json
from speechlm2_jax.pretrained.salm_config import SalmModelConfig
from speechlm2_jax.settings import SettingsError, build


@dataclass(frozen=True, kw_only=True)
class SalmBlueprint(Blueprint):
    """Everything of a SALM but its weights."""

    config: SalmModelConfig
    network: SalmConfig
    formatter: PromptFormatter
    placeholder_id: int

    @property
    def table(self) -> mapping.Table:
        """NeMo's parameter names of the whole model."""
        return salm_tables.salm_table(self.network)

    def make(self, rngs: nnx.Rngs) -> Salm:
        """Makes the network."""
        return Salm(self.network, rngs=rngs)

    def pretrained(self, infos: Mapping[str, VariableInfo]) -> Iterator[PretrainedWeights]:
        """The weights of the LLM and the ASR model."""
        if not self.config.pretrained_weights:
            return
        yield (
            open_weights(self.llm_directory),
            salm_tables.llm_table(self.network),
            infos_below("llm.", infos, without=("lora_a", "lora_b")),
        )
        if self.asr_file is not None:
            yield (
                open_weights(self.asr_file),
                salm_tables.asr_table(self.network),
                infos_below("perception.encoder.", infos)
                | infos_below("perception.log_mel.", infos),
            )


def read_blueprint(cfg: Mapping[str, Any], near: tuple[Path, ...] = ()) -> SalmBlueprint:
    """Reads configs and tokenizer, no weights. Raises SettingsError with the key to change."""
    config = build(SalmModelConfig, cfg, "model")
    location = Location(near=near)
    llm_directory = location.find(config.pretrained_llm, key="model.pretrained_llm")
    registry.require_part(llm_directory, "model.pretrained_llm", name="")
    llm_config = read_json(llm_directory / "config.json", key="model.pretrained_llm")
    decoder = hf_config.decoder_config(llm_config)
    tokenizer, placeholder_id = _tokenizer(config, location, llm_directory)
    asr_file = None
    if config.pretrained_asr is not None and needs_asr(
        config.pretrained_weights, config.perception
    ):
        asr_file = location.find_nemo(config.pretrained_asr, key="model.pretrained_asr")
        registry.require_part(asr_file, "model.pretrained_asr", name="ASRModel")
    block, perception = perception_config(config.perception, asr_file, decoder.width)
    lora = None if config.lora is None else build(LoraConfig, config.lora, "model.lora")
    try:
        if config.encoder_chunk_size_seconds is not None:
            seconds = config.encoder_chunk_size_seconds
            perception = replace(perception, encoder_chunk_size_seconds=seconds)
        network = SalmConfig(llm=decoder, perception=perception, lora=lora)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"model: {error}") from error
    return SalmBlueprint(
        config=config,
        cfg={**cfg, "perception": block},
        llm_config=llm_config,
        tokenizer=tokenizer,
        formatter=PromptFormatter(config.prompt_format, tokenizer),
        placeholder_id=placeholder_id,
        pad_id=tokenizer.pad_id,
        network=network,
        llm_directory=llm_directory,
        asr_file=asr_file,
        near=near,
    )


def _tokenizer(
    config: SalmModelConfig, location: Location, llm_directory: Path
) -> tuple[Tokenizer, int]:
    directory = llm_directory
    if config.tokenizer_path is not None:
        directory = location.find(config.tokenizer_path, key="model.tokenizer_path")
    tokenizer = Tokenizer(directory)
    tokenizer.add_special_tokens([config.audio_locator_tag])
    return tokenizer, tokenizer.require(config.audio_locator_tag, "model.audio_locator_tag")
