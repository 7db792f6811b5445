"""From NeMo's `model:` block to a network: parts found, architecture known, weights started."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from speechlm2_jax.conversion import hf_config, mapping
from speechlm2_jax.conversion import salm as salm_tables
from speechlm2_jax.conversion.placement import onto
from speechlm2_jax.conversion.readers import open_weights, read_nemo
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import VariableInfo, Variables, draw, unbind
from speechlm2_jax.models.config import SalmModelConfig
from speechlm2_jax.models.parts import Location, read_json
from speechlm2_jax.networks.salm import Salm, SalmConfig
from speechlm2_jax.parameter_paths import NamedSlice
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.settings import SettingsError, build

ASR_BLOCKS = ("preprocessor", "encoder")


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Everything about a SALM but its weights."""

    config: SalmModelConfig
    cfg: Mapping[str, Any]
    """The `model:` block with the architecture of every part filled in."""
    llm_config: Mapping[str, Any]
    """The LLM's config.json, as it was read."""
    tokenizer: Tokenizer
    formatter: PromptFormatter
    placeholder_id: int
    pad_id: int
    network: SalmConfig
    llm_directory: Path
    asr_file: Path | None

    def computing(self, **changes: Any) -> "Blueprint":
        """The same model with another `compute_dtype` or `remat`."""
        return replace(self, network=replace(self.network, **changes))


def read_blueprint(cfg: Mapping[str, Any], near: tuple[Path, ...] = ()) -> Blueprint:
    """Reads configs and tokenizer, no weights. Raises SettingsError with the key to change."""
    config = build(SalmModelConfig, cfg, "model")
    location = Location(near=near)
    llm_directory = location.find(config.pretrained_llm, key="model.pretrained_llm")
    llm_config = read_json(llm_directory / "config.json", key="model.pretrained_llm")
    decoder = hf_config.decoder_config(llm_config)
    tokenizer, placeholder_id = _tokenizer(config, location, llm_directory)
    asr_file = None
    if config.pretrained_asr is not None and _needs_asr(config):
        asr_file = location.find_nemo(config.pretrained_asr, key="model.pretrained_asr")
    perception = _perception_block(config, asr_file)
    perception.setdefault("output_dim", decoder.width)
    lora = None if config.lora is None else build(LoraConfig, config.lora, "model.lora")
    try:
        network = SalmConfig(
            llm=decoder,
            perception=build(PerceptionConfig, perception, "model.perception"),
            lora=lora,
        )
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"model: {error}") from error
    return Blueprint(
        config=config,
        cfg={**cfg, "perception": perception},
        llm_config=llm_config,
        tokenizer=tokenizer,
        formatter=PromptFormatter(config.prompt_format, tokenizer),
        placeholder_id=placeholder_id,
        pad_id=tokenizer.pad_id,
        network=network,
        llm_directory=llm_directory,
        asr_file=asr_file,
    )


def parameter_names(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> list[NamedSlice]:
    """NeMo's name for every slice of every variable, for freeze patterns."""
    return mapping.names(salm_tables.salm_table(blueprint.network), infos)


def state_dict(blueprint: Blueprint, variables: Variables) -> dict[str, np.ndarray]:
    """Values by variable path -> the same under NeMo's names, aliases left out."""
    host = {path: np.asarray(value) for path, value in variables.items()}
    return mapping.export(host, salm_tables.salm_table(blueprint.network))


def start(
    blueprint: Blueprint,
    infos: Mapping[str, VariableInfo],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Variables:
    """Loads what has pretrained weights and starts the rest at random.

    With `layout` each variable is streamed to where its leaf says; else they stay on the host.
    """
    place = None if layout is None else onto(layout)
    loaded: Variables = {}
    for source, table, wanted in _pretrained(blueprint, infos):
        loaded |= mapping.load(source, table, wanted, place)
    missing = frozenset(infos) - frozenset(loaded)
    return loaded | random_variables(blueprint.network, blueprint.config.seed, missing, layout)


def check_weights(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> None:
    """Compares names and shapes of the pretrained weights with the model's, reading no value.

    Raises ConversionError or SettingsError for what is missing or does not fit.
    """
    for source, table, wanted in _pretrained(blueprint, infos):
        mapping.check(source, table, wanted)


def random_variables(
    network: SalmConfig,
    seed: int,
    paths: frozenset[str],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Variables:
    """Draws the named variables from their initial distributions, and only those."""

    def make() -> Variables:
        variables = unbind(Salm(network, rngs=nnx.Rngs(seed)))[1]
        return {path: value for path, value in variables.items() if path in paths}

    return draw(make, layout)


def _tokenizer(
    config: SalmModelConfig, location: Location, llm_directory: Path
) -> tuple[Tokenizer, int]:
    directory = llm_directory
    if config.tokenizer_path is not None:
        directory = location.find(config.tokenizer_path, key="model.tokenizer_path")
    tokenizer = Tokenizer(directory)
    tokenizer.add_special_tokens([config.audio_locator_tag])
    return tokenizer, tokenizer.require(config.audio_locator_tag, "model.audio_locator_tag")


def _needs_asr(config: SalmModelConfig) -> bool:
    return config.pretrained_weights or any(b not in config.perception for b in ASR_BLOCKS)


def _perception_block(config: SalmModelConfig, asr_file: Path | None) -> dict[str, Any]:
    """The perception block; where the user's says nothing, the ASR model's own blocks hold."""
    block = dict(config.perception)
    asr = {} if asr_file is None else read_nemo(asr_file).config
    for name in ASR_BLOCKS:
        own = {k: v for k, v in (block.get(name) or {}).items() if v is not None}
        if name in asr:
            # NeMo: the user's encoder keys override; the preprocessor is the ASR model's
            block[name] = {**asr[name], **(own if name == "encoder" else {})}
        elif not own:
            raise SettingsError(
                f"model.perception.{name}: required, because no pretrained_asr gives it; set "
                "model.pretrained_asr to a .nemo file or write the block"
            )
    return block


def _pretrained(
    blueprint: Blueprint, infos: Mapping[str, VariableInfo]
) -> Iterator[tuple[mapping.TensorSource, mapping.Table, dict[str, VariableInfo]]]:
    """Where pretrained weights are, how they are named, and what they fill."""
    if not blueprint.config.pretrained_weights:
        return
    yield (
        open_weights(blueprint.llm_directory),
        salm_tables.llm_table(blueprint.network),
        _under("llm.", infos, but=("lora_a", "lora_b")),
    )
    if blueprint.asr_file is not None:
        yield (
            open_weights(blueprint.asr_file),
            salm_tables.asr_table(blueprint.network),
            _under("perception.encoder.", infos) | _under("perception.log_mel.", infos),
        )


def _under(
    prefix: str, infos: Mapping[str, VariableInfo], but: tuple[str, ...] = ()
) -> dict[str, VariableInfo]:
    return {
        path: info
        for path, info in infos.items()
        if path.startswith(prefix) and not path.endswith(but or ("\0",))
    }
