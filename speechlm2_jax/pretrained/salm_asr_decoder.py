"""NeMo's `model:` block of a SALMWithAsrDecoder -> its blueprint: a SALM on a whole ASR model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.asr.transducer import TransducerConfig
from speechlm2_jax.conversion.readers import NemoArchive, memory_source, open_weights, read_nemo
from speechlm2_jax.conversion.readers.nemo import CONFIG as NEMO_CONFIG
from speechlm2_jax.conversion.readers.nemo import WEIGHTS as NEMO_WEIGHTS
from speechlm2_jax.conversion.transducer import transducer_table
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.asr import (
    TransducerDecodingConfig,
    choose_decoder,
    read_architecture,
    read_decoding,
)
from speechlm2_jax.pretrained.asr_labels import LabelDecoder, class_name, nemo_label_decoder
from speechlm2_jax.pretrained.blueprint import PretrainedWeights, infos_below
from speechlm2_jax.pretrained.components import ASR_BLOCKS, find_llm, perception_config
from speechlm2_jax.pretrained.locate import ASR, Location, read_config_json
from speechlm2_jax.pretrained.registry import CONFIG
from speechlm2_jax.pretrained.salm import SalmBlueprint, blueprint_fields
from speechlm2_jax.pretrained.salm_config import TRANSCRIBING, SalmAsrDecoderModelConfig
from speechlm2_jax.settings import SettingsError, build

KEY = "model.pretrained_asr"
PARTS = ("encoder", "log_mel", "prediction", "joint", "head")
"""Modules of perception that are the ASR model's."""


@dataclass(frozen=True, kw_only=True)
class AsrDecoder:
    """How the ASR model of a SALMWithAsrDecoder writes its transcript."""

    archive: NemoArchive
    """Its config and the files of its tokenizer."""
    to_text: LabelDecoder
    decoding: TransducerDecodingConfig
    network: TransducerConfig


@dataclass(frozen=True, kw_only=True)
class SalmAsrDecoderBlueprint(SalmBlueprint):
    """Everything of a SALMWithAsrDecoder but its weights."""

    config: SalmAsrDecoderModelConfig
    asr: AsrDecoder

    def pretrained_asr(self, file: Path, infos: Mapping[str, VariableInfo]) -> PretrainedWeights:
        """The whole ASR model."""
        return (
            open_weights(file),
            transducer_table(self.asr.network).prefixed(target="perception."),
            {
                path: info
                for part in PARTS
                for path, info in infos_below(f"perception.{part}.", infos).items()
            },
        )

    def component_configs(self) -> dict[str, Mapping[str, Any]]:
        """Configs of the LLM and of the ASR model."""
        return {**super().component_configs(), ASR: self.asr.archive.config}

    def component_files(self) -> dict[str, bytes]:
        """The files of the ASR model's tokenizer."""
        archive = self.asr.archive
        names = {name for name in archive.members if Path(name).name == name}
        names -= {NEMO_CONFIG, NEMO_WEIGHTS}
        return {f"{ASR}/{name}": archive.artifact(name) for name in sorted(names)}


def read_blueprint(cfg: Mapping[str, Any], near: tuple[Path, ...] = ()) -> SalmAsrDecoderBlueprint:
    """Reads configs and tokenizers, no weights. Raises SettingsError with the key to change."""
    config = build(SalmAsrDecoderModelConfig, cfg, "model")
    location = Location(near=near)
    llm = find_llm(config, location)
    assert config.pretrained_asr is not None
    archive = _archive(config.pretrained_asr, location)
    asr = read_asr(archive)
    block, perception = perception_config(
        _perception_block(config.perception, archive), None, llm.decoder.width
    )
    block = {**block, ASR: archive.config}  # as NeMo writes it
    return SalmAsrDecoderBlueprint(
        **blueprint_fields(config, cfg, llm, (block, perception), asr.network),
        asr=asr,
        asr_file=None if archive.path.is_dir() else archive.path,
        near=near,
    )


def _perception_block(given: Mapping[str, Any], archive: NemoArchive) -> dict[str, Any]:
    """The perception block with the preprocessor and encoder of the ASR model, which decides."""
    for name in ASR_BLOCKS:
        for key, value in (given.get(name) or {}).items():
            if archive.config[name].get(key) != value:
                raise SettingsError(
                    f"model.perception.{name}.{key}={value!r}: {archive.path} has "
                    f"{archive.config[name].get(key)!r}, which {TRANSCRIBING} keeps; leave it out"
                )
    adapter = given.get("modality_adapter") or {}
    if not adapter.get("include_final_output", True):
        raise SettingsError(
            "model.perception.modality_adapter.include_final_output=False is not supported with "
            f"{TRANSCRIBING}, where NeMo transcribes a layer below the encoder's output"
        )
    own = {key: value for key, value in given.items() if key != ASR}
    return {**own, **{name: archive.config[name] for name in ASR_BLOCKS}}


def read_asr(archive: NemoArchive) -> AsrDecoder:
    """Raises SettingsError for an ASR model that is not a supported transducer."""
    decoder = choose_decoder(archive)
    if decoder != "rnnt":
        raise SettingsError(
            f"{KEY}: {archive.path} is {class_name(archive)}, which has no transducer decoder; "
            "name an RNN-T, TDT or hybrid model"
        )
    decoding, to_text = read_decoding(archive, decoder), nemo_label_decoder(archive, decoder)
    network = read_architecture(archive, decoder, decoding, len(to_text))
    assert isinstance(network, TransducerConfig)
    return AsrDecoder(archive=archive, to_text=to_text, decoding=decoding, network=network)


def _archive(name: str, location: Location) -> NemoArchive:
    """A `.nemo` file, or the folder that a saved model keeps of one."""
    found = location.local(name)
    if found is None or not (found / CONFIG).is_file():
        file = location.find_nemo(name, key=KEY)
        registry.require_part(file, KEY, name="ASRModel")
        return read_nemo(file)
    return NemoArchive(
        path=found,
        config=read_config_json(found / CONFIG, key=KEY),
        weights=memory_source({}),
        members={
            file.name: memoryview(file.read_bytes())
            for file in sorted(found.iterdir())
            if file.is_file() and file.name != CONFIG
        },
    )
