"""LoRA with the keys and the meaning of NeMo Automodel."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.layers.automodel_lora import AutomodelLoraConfig
from speechlm2_jax.layers.lora import LoraConfig, LoraLinear
from speechlm2_jax.layers.module import merge, split
from speechlm2_jax.settings import SettingsError, build

D_IN, D_OUT = 6, 4


def layer(config: LoraConfig | None) -> LoraLinear:
    return LoraLinear(D_IN, D_OUT, axes=("heads", "embed"), rngs=nnx.Rngs(0), lora=config)


AUTOMODEL = {"dim": 3, "alpha": 12, "dropout": 0.5, "target_modules": ["q_proj", "*.mlp.up_proj"]}


def test_automodels_keys_are_read():
    config = build(AutomodelLoraConfig, AUTOMODEL, "model.lora")
    assert (config.r, config.lora_dropout, config.scale) == (3, 0.5, 4.0)
    assert config.drops_output and not replace(config, dropout_position="pre").drops_output
    assert build(AutomodelLoraConfig, {"target_modules": ["q_proj"]}).scale == 32 / 8


@pytest.mark.parametrize(
    ("given", "layer", "is_adapted"),
    [
        ("q_proj", "self_attn.q_proj", True),
        ("q_proj", "self_attn.k_proj", False),
        ("*_proj", "mlp.down_proj", True),
        ("*.mlp.*", "mlp.down_proj", True),
        ("*.mlp.*", "self_attn.q_proj", False),
        ("self_attn.q_proj", "self_attn.q_proj", False),  # a pattern is of the whole path
        ("*.self_attn.q_proj", "self_attn.q_proj", True),
    ],
)
def test_automodels_patterns_are_of_whole_paths(given, layer, is_adapted):
    config = build(AutomodelLoraConfig, AUTOMODEL, "model.lora")
    assert config.adapts(given, layer) is is_adapted


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target_modules": []}, "name the adapted layers"),
        ({"match_all_linear": True}, "adapts the head too"),
        ({"exclude_modules": ["lm_head"]}, "list the adapted layers"),
        ({"use_dora": True}, "only plain LoRA"),
    ],
)
def test_what_automodel_can_and_this_cannot_is_refused(change, match):
    with pytest.raises(SettingsError, match=match):
        build(AutomodelLoraConfig, {**AUTOMODEL, **change}, "model.lora")


def test_a_pattern_of_some_layers_is_refused():
    config = build(AutomodelLoraConfig, AUTOMODEL, "model.lora")
    with pytest.raises(ValueError, match="some layers only"):
        config.adapts("*.layers.1.*", "self_attn.q_proj")


def test_automodels_dropout_acts_on_the_output_of_the_adapter():
    config = build(AutomodelLoraConfig, AUTOMODEL, "model.lora")
    graphdef, variables = split(layer(config))
    variables["lora_b"] = jax.random.normal(jax.random.key(2), (D_OUT, 3))
    adapted, base = merge(graphdef, variables), layer(None)
    x = jax.random.normal(jax.random.key(1), (3, 50, D_IN))
    plain = np.asarray(adapted(x) - base(x))
    dropped = np.asarray(adapted(x, jax.random.split(jax.random.key(0), 3)) - base(x))
    kept = np.abs(dropped) > 1e-6  # elements of the output, not whole rows of it
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(dropped[kept], 2 * plain[kept], atol=1e-4)


def test_automodel_draws_the_first_matrix_as_xavier():
    config = build(AutomodelLoraConfig, {**AUTOMODEL, "dim": 2000}, "model.lora")
    drawn = np.asarray(split(layer(config))[1]["lora_a"])
    np.testing.assert_allclose(drawn.std(), np.sqrt(2 / (D_IN + 2000)), rtol=0.02)
    assert np.abs(drawn).max() > 3 * drawn.std()  # normal, not uniform
