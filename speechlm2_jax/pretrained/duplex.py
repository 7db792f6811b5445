"""NeMo's `model:` block of a duplex model -> `DuplexBlueprint`: components and architecture."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from speechlm2_jax.conversion import duplex as duplex_tables
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.readers import open_weights, read_nemo
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.networks.duplex import Duplex, DuplexConfig
from speechlm2_jax.networks.duplex_s2s import DuplexS2S
from speechlm2_jax.networks.duplex_s2s_speech_decoder import DuplexS2SSpeechDecoder
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.blueprint import Blueprint, PretrainedWeights, infos_below
from speechlm2_jax.pretrained.codec_config import codec_config
from speechlm2_jax.pretrained.components import find_asr, find_llm, perception_config, read_lora
from speechlm2_jax.pretrained.duplex_config import DuplexModelConfig, DuplexSpeechDecoderModelConfig
from speechlm2_jax.pretrained.locate import AUDIO_CODEC, Location, read_config_json
from speechlm2_jax.settings import SettingsError, build
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DuplexBlueprint(Blueprint):
    """Everything of a duplex model but its weights."""

    config: DuplexModelConfig
    network: DuplexConfig
    codec_cfg: Mapping[str, object]
    """The codec's own config, unchanged."""
    codec_file: Path | None
    """Its `.nemo` file; None where there is only the config."""

    def find_scoring_asr(self) -> Path | None:
        """The `.nemo` file of the scoring ASR model, downloaded if necessary; None without one.

        Raises SettingsError if it cannot be found.
        """
        name = self.config.scoring_asr
        if not name:
            return None
        location = Location(near=self.near)
        if "/" not in name and not name.endswith(".nemo") and location.local(name) is None:
            name = f"nvidia/{name}"  # NeMo's bare names are NVIDIA's, on the hub too
        try:
            return location.find_nemo(name, key="model.scoring_asr")
        except SettingsError as error:
            raise SettingsError(f"{error}, or null to leave the agent's speech unscored") from error

    @property
    def table(self) -> mapping.Table:
        """NeMo's parameter names of the whole model."""
        return duplex_tables.duplex_table(self.network)

    def make(self, rngs: nnx.Rngs) -> Duplex:
        """Makes the network."""
        kind = DuplexS2S if self.network.speech_decoder is None else DuplexS2SSpeechDecoder
        return kind(self.network, rngs=rngs)

    def pretrained(self, infos: Mapping[str, VariableInfo]) -> Iterator[PretrainedWeights]:
        """The weights of the codec, the LLM and the ASR model."""
        if self.codec_file is not None:
            # the codec is always pretrained: it is never trained here
            yield (
                open_weights(self.codec_file),
                duplex_tables.codec_file_table(self.network),
                infos_below("codec.", infos),
            )
        yield from super().pretrained(infos)

    def component_configs(self) -> dict[str, Mapping[str, Any]]:
        """Configs of the components, by their folder in a saved model."""
        return {**super().component_configs(), AUDIO_CODEC: self.codec_cfg}


def read_blueprint(
    kind: type[DuplexModelConfig], cfg: Mapping[str, object], near: tuple[Path, ...] = ()
) -> DuplexBlueprint:
    """Reads configs and tokenizer, no weights. Raises SettingsError with the key to change."""
    config = build(kind, cfg, "model")
    location = Location(near=near)
    llm = find_llm(config, location)
    tokenizer = Tokenizer(llm.tokenizer)
    codec_cfg, codec_file = _codec(config, location)
    asr_file = find_asr(config, location)
    block, perception = perception_config(config.perception, asr_file, llm.decoder.width)
    try:
        network = DuplexConfig(
            llm=llm.decoder,
            perception=perception,
            codec=codec_config(codec_cfg, "model.pretrained_audio_codec"),
            text=text_ids(tokenizer, llm.decoder.vocab_size),
            speech_decoder=_speech_decoder(config),
            lora=read_lora(config, llm.decoder),
            text_loss_weight=config.text_loss_weight,
            audio_loss_weight=config.audio_loss_weight,
            user_channel_weight=config.duplex_user_channel_weight,
            nemo_exact=config.nemo_exact,
        )
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"model: {error}") from error
    return DuplexBlueprint(
        config=config,
        cfg={**cfg, "perception": block},
        llm_config=llm.config,
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_id,
        network=network,
        llm_directory=llm.directory,
        asr_file=asr_file,
        codec_cfg=codec_cfg,
        codec_file=codec_file,
        near=near,
    )


def _speech_decoder(config: DuplexModelConfig) -> SpeechDecoderConfig | None:
    if not isinstance(config, DuplexSpeechDecoderModelConfig):
        return None
    if not config.speech_decoder.is_causal:
        raise SettingsError(
            "model.speech_decoder.is_causal: false is not supported, because generation is causal; "
            "set it to true"
        )
    return config.speech_decoder


def _codec(config: DuplexModelConfig, location: Location) -> tuple[dict[str, Any], Path | None]:
    """The codec's config, from a saved model's folder or from its `.nemo` file."""
    key = "model.pretrained_audio_codec"
    found = location.local(config.pretrained_audio_codec)
    if found is not None and (found / "config.json").is_file():
        return read_config_json(found / "config.json", key=key), None
    file = location.find_nemo(config.pretrained_audio_codec, key=key)
    registry.require_part(file, key, name="AudioCodec")
    return dict(read_nemo(file).config), file


def text_ids(tokenizer: Tokenizer, rows: int) -> TextIds:
    """The tokens that are no text. Raises SettingsError for one that the LLM has no row for."""
    tokenizer.limit_ids(rows)
    ids = TextIds(
        pad=tokenizer.pad_id,
        bos=_turn_id(tokenizer.bos_id, "bos", "start"),
        eos=_turn_id(tokenizer.eos_id, "eos", "end"),
    )
    if max(ids.pad, ids.bos, ids.eos) >= rows:
        raise SettingsError(
            f"model.pretrained_llm: its tokenizer's pad, bos and eos are the tokens {ids.pad}, "
            f"{ids.bos} and {ids.eos}, but the LLM's embedding has {rows} rows; set others in "
            "tokenizer_config.json, or resize the LLM"
        )
    if ids.pad in (ids.bos, ids.eos):
        # allowed because NeMo has such checkpoints; bad for training a new model
        _log.warning(
            "model.pretrained_llm: its tokenizer's pad token %d is also its bos or eos token, so "
            "silent frames look like starts or ends of turns; set another pad_token in "
            "tokenizer_config.json",
            ids.pad,
        )
    return ids


def _turn_id(found: int | None, name: str, marks: str) -> int:
    if found is None:
        raise SettingsError(
            f"model.pretrained_llm: its tokenizer has no {name} token, which marks the {marks} of "
            f"the agent's turns; add {name}_token to tokenizer_config.json, or set "
            "model.tokenizer_path to another tokenizer"
        )
    return found
