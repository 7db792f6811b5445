"""NeMo's `model:` block of a duplex speech-to-text model -> `DuplexSttBlueprint`."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from speechlm2_jax.conversion import duplex_stt as stt_tables
from speechlm2_jax.conversion import mapping
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.generation.forced_turns import ForcedTurns
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.networks.duplex_stt import DuplexStt, DuplexSttConfig, TurnBoosts
from speechlm2_jax.networks.stt_channels import ChannelShifts
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.pretrained.blueprint import Blueprint, PretrainedWeights, infos_below
from speechlm2_jax.pretrained.components import (
    LlmFiles,
    find_asr,
    find_llm,
    perception_config,
    read_lora,
)
from speechlm2_jax.pretrained.duplex import text_ids
from speechlm2_jax.pretrained.duplex_stt_config import DuplexSttModelConfig
from speechlm2_jax.pretrained.llm_files import llm_weights
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError, build

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DuplexSttBlueprint(Blueprint):
    """Everything of a duplex speech-to-text model but its weights."""

    config: DuplexSttModelConfig
    network: DuplexSttConfig
    forced_turns: ForcedTurns | None
    """How inference forces the agent's turns; None: it does not."""

    @property
    def table(self) -> mapping.Table:
        """NeMo's parameter names of the whole model."""
        return stt_tables.duplex_stt_table(self.network)

    def make(self, rngs: nnx.Rngs) -> DuplexStt:
        """Makes the network."""
        return DuplexStt(self.network, rngs=rngs)

    def pretrained(self, infos: Mapping[str, VariableInfo]) -> Iterator[PretrainedWeights]:
        """The weights of the LLM and the ASR model; the user's channel has copies of the LLM's."""
        yield from super().pretrained(infos)
        if self.config.pretrained_weights and self.network.has_user_text:
            yield (
                llm_weights(self.llm_directory),
                stt_tables.user_text_table(self.network.llm),
                infos_below("user_", infos),
            )


def read_blueprint(cfg: Mapping[str, object], near: tuple[Path, ...] = ()) -> DuplexSttBlueprint:
    """Reads configs and tokenizer, no weights. Raises SettingsError with the key to change."""
    config = build(DuplexSttModelConfig, cfg, "model")
    location = Location(near=near)
    llm = find_llm(config, location)
    tokenizer = _tokenizer(config, llm)
    asr_file = find_asr(config, location)
    block, perception = perception_config(config.perception, asr_file, llm.decoder.width)
    _check_rate(config, perception)
    ids = text_ids(tokenizer, llm.decoder.vocab_size)
    try:
        network = _network(config, llm, perception, ids)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"model: {error}") from error
    return DuplexSttBlueprint(
        config=config,
        cfg={**cfg, "perception": block},
        llm_config=llm.config,
        tokenizer=tokenizer,
        pad_id=tokenizer.pad_id,
        network=network,
        llm_directory=llm.directory,
        asr_file=asr_file,
        forced_turns=_forced_turns(config, tokenizer, ids),
        near=near,
    )


def _network(
    config: DuplexSttModelConfig, llm: LlmFiles, perception: PerceptionConfig, ids: TextIds
) -> DuplexSttConfig:
    return DuplexSttConfig(
        llm=llm.decoder,
        perception=perception,
        text=ids,
        lora=read_lora(config, llm.decoder),
        has_user_text=config.predict_user_text,
        text_loss_weight=config.text_loss_weight,
        user_text_loss_weight=config.asr_loss_weight,
        user_channel_weight=config.duplex_user_channel_weight,
        text_channel_weight=config.duplex_text_channel_weight,
        user_text_channel_weight=config.duplex_asr_text_weight,
        shifts=ChannelShifts(
            advance_text=config.advance_text_channel_by or 0,
            delay_text=config.delay_text_channel_by or 0,
            delay_eos=config.delay_text_eos_by or 0,
            delay_bos=config.delay_text_bos_by or 0,
            delay_user_text=config.delay_source_text_by or 0,
        ),
        token_weights=config.token_loss_weight,
        masks_sequence=config.mask_sequence_loss,
        boosts=TurnBoosts(
            pad=config.inference_pad_boost or 0.0,
            bos=config.inference_bos_boost or 0.0,
            eos=config.inference_eos_boost or 0.0,
        ),
        nemo_exact=config.nemo_exact,
    )


def _tokenizer(config: DuplexSttModelConfig, llm: LlmFiles) -> Tokenizer:
    """The tokenizer with the special tokens of the block."""
    tokenizer = Tokenizer(llm.tokenizer)
    names = ("bos_token", "eos_token", "pad_token")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if given:
        tokenizer.add_special_tokens(given)
    return tokenizer


def _check_rate(config: DuplexSttModelConfig, perception: PerceptionConfig) -> None:
    own = perception.preprocessor.sample_rate
    if config.source_sample_rate not in (None, own):
        raise SettingsError(
            f"model.source_sample_rate={config.source_sample_rate} does not fit the speech "
            f"encoder, which expects {own}"
        )


def _forced_turns(
    config: DuplexSttModelConfig, tokenizer: Tokenizer, ids: TextIds
) -> ForcedTurns | None:
    if not config.force_turn_taking:
        return None
    if not config.predict_user_text:
        _log.warning(
            "model.force_turn_taking has no effect without model.predict_user_text: turns are "
            "forced by the user's text"
        )
        return None

    def of_user(own: int, further: str | None, key: str) -> tuple[int, ...]:
        if further is None:
            return (own,)
        found = tokenizer.text_to_ids(further)
        if not found:
            raise SettingsError(f"model.{key}: {further!r} has no token")
        return (own, found[0])

    return ForcedTurns(
        user_starts=of_user(ids.bos, config.user_bos_token, "user_bos_token"),
        user_ends=of_user(ids.eos, config.user_eos_token, "user_eos_token"),
        threshold_frames=config.force_turn_taking_threshold,
        pad_window_frames=config.force_turn_taking_pad_window,
    )
