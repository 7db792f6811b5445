"""Finds the components that a `model:` block names, and reads what they are; no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from speechlm2_jax.conversion import hf_config
from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.layers.automodel_lora import AutomodelLoraConfig
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.linear_layers import fit_lora, lora_note
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.llm_files import llm_config, tokenizer_folder
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError, build

ASR_BLOCKS = ("preprocessor", "encoder")


@runtime_checkable
class ModelConfig(Protocol):
    """The keys of every `model:` block that builds on a pretrained LLM."""

    @property
    def pretrained_llm(self) -> str:
        """The LLM: a directory, GGUF file or hub name."""
        ...

    @property
    def pretrained_asr(self) -> str | None:
        """The ASR model: a `.nemo` file or hub name."""
        ...

    @property
    def tokenizer_path(self) -> str | None:
        """The tokenizer, if it is not the LLM's."""
        ...

    @property
    def perception(self) -> Mapping[str, Any]:
        """NeMo's `perception` block."""
        ...

    @property
    def pretrained_weights(self) -> bool:
        """Whether the components give weights too, or their architecture alone."""
        ...

    @property
    def freeze_params(self) -> tuple[str, ...]:
        """Patterns of parameter names that are frozen."""
        ...

    @property
    def prevent_freeze_params(self) -> tuple[str, ...]:
        """Patterns that override `freeze_params`."""
        ...

    @property
    def lora(self) -> Mapping[str, Any] | None:
        """NeMo's `lora` block."""
        ...

    @property
    def quantize_frozen_llm(self) -> str | None:
        """8-bit format of the LLM's weights, which are frozen; None: those of the dtype."""
        ...

    @property
    def optimizer(self) -> Mapping[str, Any] | None:
        """NeMo's `optimizer` block."""
        ...

    @property
    def lr_scheduler(self) -> Mapping[str, Any] | None:
        """NeMo's `lr_scheduler` block."""
        ...

    @property
    def nemo_exact(self) -> bool:
        """Whether results that depend on NeMo's own padding are reproduced."""
        ...

    @property
    def init_from_checkpoint(self) -> str | None:
        """A model whose weights override all others."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the random initialization."""
        ...


@dataclass(frozen=True, kw_only=True)
class LlmFiles:
    """Where a model's LLM and tokenizer are, and what the LLM is."""

    directory: Path
    """A Hugging Face directory, or a GGUF file."""
    config: dict[str, object]
    """Its config.json, unchanged."""
    decoder: DecoderConfig
    tokenizer: Path


def lora_class(block: Mapping[str, Any]) -> type[LoraConfig]:
    """The class of the `lora` block in a `model:` block."""
    return AutomodelLoraConfig if block.get("use_nemo_automodel") else LoraConfig


def read_lora(config: ModelConfig, decoder: DecoderConfig) -> LoraConfig | None:
    """Reads the `lora` block; its target_modules are those that name layers of the LLM.

    Raises SettingsError for a block that PEFT or this project refuses.
    """
    if config.lora is None:
        return None
    lora = build(_lora_class(config), config.lora, "model.lora")
    try:
        return fit_lora(lora, decoder)
    except ValueError as error:
        raise SettingsError(f"model.{error}") from error


def lora_notes(config: ModelConfig, decoder: DecoderConfig) -> tuple[str, ...]:
    """A line about names in the `lora` block that name no layer of the LLM, if there are any."""
    if config.lora is None:
        return ()
    note = lora_note(build(_lora_class(config), config.lora, "model.lora"), decoder)
    return () if note is None else (f"model.{note}",)


def _lora_class(config: ModelConfig) -> type[LoraConfig]:
    return lora_class({"use_nemo_automodel": getattr(config, "use_nemo_automodel", False)})


def find_llm(config: ModelConfig, location: Location) -> LlmFiles:
    """Finds the LLM and the tokenizer of a `model:` block; reads no weights."""
    directory = location.find(config.pretrained_llm, key="model.pretrained_llm")
    registry.require_part(directory, "model.pretrained_llm", name="")
    config_json = llm_config(directory, key="model.pretrained_llm")
    decoder = hf_config.decoder_config(config_json)
    tokenizer, key = directory, "model.pretrained_llm"
    if config.tokenizer_path is not None:
        key = "model.tokenizer_path"
        tokenizer = location.find(config.tokenizer_path, key=key)
    return LlmFiles(
        directory=directory,
        config=config_json,
        decoder=decoder,
        tokenizer=tokenizer_folder(tokenizer, key=key),
    )


def find_asr(config: ModelConfig, location: Location) -> Path | None:
    """The `.nemo` file of the pretrained ASR model; None if a model needs nothing of it."""
    needed = config.pretrained_weights or any(b not in config.perception for b in ASR_BLOCKS)
    if config.pretrained_asr is None or not needed:
        return None
    file = location.find_nemo(config.pretrained_asr, key="model.pretrained_asr")
    registry.require_part(file, "model.pretrained_asr", name="ASRModel")
    return file


def perception_config(
    block: Mapping[str, Any], asr_file: Path | None, llm_width: int
) -> tuple[dict[str, Any], PerceptionConfig]:
    """The perception block; keys that the user leaves out come from the ASR model."""
    merged = dict(block)
    asr = {} if asr_file is None else read_nemo(asr_file).config
    for name in ASR_BLOCKS:
        own = {k: v for k, v in (merged.get(name) or {}).items() if v is not None}
        if name in asr:
            # NeMo: the user's encoder keys override; the preprocessor is the ASR model's
            merged[name] = {**asr[name], **(own if name == "encoder" else {})}
        elif not own:
            raise SettingsError(
                f"model.perception.{name}: required without model.pretrained_asr; write the block, "
                "or set model.pretrained_asr to a .nemo file"
            )
    # as in NeMo, the output width of perception is the LLM's, whatever the YAML has
    merged["output_dim"] = llm_width
    adapter = merged.get("modality_adapter")
    if isinstance(adapter, Mapping) and adapter.get("output_dim") is not None:
        merged["modality_adapter"] = {**adapter, "output_dim": llm_width}
    return merged, build(PerceptionConfig, merged, "model.perception")
