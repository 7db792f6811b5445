"""NeMo's keys build a speech decoder; keys of other models are refused with NeMo's name."""

from dataclasses import replace

import pytest

from speechlm2_jax.settings import SettingsError, build
from speechlm2_jax.settings.build import ignored_report
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from tests.speech_decoder.small_decoder import CONFIG

SIZES = {"n_layers": 2, "d_model": 12, "d_ffn": 24, "sa_n_heads": 3, "kernel_size": 3}
NEMO_YAML = {
    "n_layers": 12,
    "d_model": 768,
    "d_ffn": 3072,
    "sa_n_heads": 12,
    "kernel_size": 3,
    "p_dropout": 0.1,
    "p_dropout_out": 0.0,
    "has_xattn": False,
    "xa_d_memory": 768,
    "xa_n_heads": 12,
    "is_causal": True,
    "apply_norm_to_cond": True,
    "apply_norm_out": True,
    "max_length_causal_mask": 5000,
    "cond_on_prev_audio_tokens": True,
    "detach_input": False,
    "use_learnable_pos_emb": True,
}
"""The block of s2s_duplex_speech_decoder.yaml (NeMo, September 2025)."""


def test_the_block_of_nemos_yaml_builds_as_it_is() -> None:
    config = build(SpeechDecoderConfig, NEMO_YAML, "model.speech_decoder")
    assert {key: getattr(config, key) for key in NEMO_YAML} == NEMO_YAML
    assert not config.is_guided


def test_defaults_are_nemos() -> None:
    config = build(SpeechDecoderConfig, SIZES)
    assert (config.p_dropout, config.is_causal, config.apply_norm_out) == (0.0, True, False)
    assert (config.max_length_causal_mask, config.use_learnable_pos_emb) == (4096, False)
    assert (config.cfg_unconditional_prob, config.cfg_scale) == (None, 2.5)
    assert (config.cond_on_prev_audio_tokens, config.detach_input) == (True, False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_layers": 6}, "num_layers: the speech decoder's key is n_layers (got 6)"),
        ({"d_ff": 64}, "d_ff: the speech decoder's key is d_ffn (got 64)"),
        ({"num_heads": 4}, "num_heads: the speech decoder's key is sa_n_heads (got 4)"),
        ({"dropout_rate": 0.1}, "dropout_rate: the speech decoder's key is p_dropout (got 0.1)"),
        ({"hidden_size": 8}, "hidden_size: the speech decoder's key is d_model (got 8)"),
        ({"d_kv": 64}, "d_kv: heads are d_model / sa_n_heads wide (got 64)"),
        ({"use_moe": True}, "use_moe: experts in the speech decoder are not supported"),
        ({"kernel_sizes": 3}, "kernel_size"),
        ({"sa_n_heads": 5}, "sa_n_heads=5 must divide d_model=12"),
        ({"has_xattn": True, "xa_n_heads": 2}, "has_xattn needs xa_d_memory"),
        ({"is_causal": False, "kernel_size": 2}, "kernel_size=2 must be odd"),
        ({"p_dropout": 1.0}, "p_dropout=1.0 must be in [0, 1)"),
        ({"cfg_unconditional_prob": 1.5}, "cfg_unconditional_prob=1.5 must be in [0, 1]"),
        ({"max_length_causal_mask": 0}, "max_length_causal_mask=0 must be at least 1"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given: dict, expected: str) -> None:
    with pytest.raises(SettingsError) as error:
        build(SpeechDecoderConfig, {**SIZES, **given}, "model.speech_decoder")
    message = str(error.value)
    assert message.startswith("model.speech_decoder")
    assert expected in message
    assert "\n" not in message


def test_keys_of_experts_are_ignored_with_the_reason() -> None:
    with ignored_report() as report:
        build(SpeechDecoderConfig, {**SIZES, "use_moe": False, "num_experts": 8}, "sd")
    assert report == {"sd.num_experts": "only read with use_moe, which is refused"}


def test_cross_attention_heads_have_their_own_width() -> None:
    config = replace(CONFIG, has_xattn=True, xa_d_memory=5, xa_n_heads=2)
    assert config.cross_head_width == 8
    assert replace(config, xa_d_head=3).cross_head_width == 3
