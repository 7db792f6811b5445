"""LoRA with PEFT's meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.layers.lora import TARGET_NAMES, LoraConfig, LoraLinear, merge_lora
from speechlm2_jax.layers.module import describe, merge, split
from speechlm2_jax.settings import SettingsError, build

ATOL = 1e-5  # one layer in fp32
D_IN, D_OUT, RANK = 6, 4, 3


def layer(config: LoraConfig | None) -> LoraLinear:
    return LoraLinear(D_IN, D_OUT, axes=("heads", "embed"), rngs=nnx.Rngs(0), lora=config)


def inputs(batch: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, 5, D_IN))


def with_adapter(config: LoraConfig) -> LoraLinear:
    graphdef, variables = split(layer(config))
    variables["lora_b"] = jax.random.normal(jax.random.key(2), (D_OUT, RANK))
    return merge(graphdef, variables)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / RANK), (True, 16 / RANK**0.5)])
def test_output_is_base_plus_scaled_low_rank_product(rslora: bool, scale: float) -> None:
    adapted = with_adapter(LoraConfig(r=RANK, lora_alpha=16, use_rslora=rslora))
    x = np.asarray(inputs())
    a, b = np.asarray(adapted.lora_a[...]), np.asarray(adapted.lora_b[...])
    expected = x @ np.asarray(adapted.weight[...]).T + scale * (x @ a.T @ b.T)
    np.testing.assert_allclose(adapted(inputs()), expected, atol=ATOL)


def test_a_new_adapter_changes_nothing_and_starts_as_in_peft() -> None:
    adapted = layer(LoraConfig(r=RANK))
    np.testing.assert_array_equal(adapted(inputs()), layer(None)(inputs()))
    assert not np.asarray(adapted.lora_b[...]).any()
    a = np.asarray(LoraLinear(D_IN, D_OUT, axes=("heads", "embed"), rngs=nnx.Rngs(1),
                              lora=LoraConfig(r=2000)).lora_a[...])  # fmt: skip
    bound = D_IN**-0.5
    assert abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.02)


def test_adapters_have_axes() -> None:
    infos = describe(layer(LoraConfig(r=RANK)))
    assert infos["lora_a"].axes == ("rank", "embed")
    assert infos["lora_b"].axes == ("heads", "rank")


def test_merged_weights_give_the_same_output_without_an_adapter() -> None:
    config = LoraConfig(r=RANK, lora_alpha=16)
    adapted = with_adapter(config)
    merged = merge_lora(split(adapted)[1], config)
    plain: LoraLinear = merge(split(layer(None))[0], merged)
    np.testing.assert_allclose(plain(inputs()), adapted(inputs()), atol=ATOL)


def test_dropout_acts_on_the_adapter_only_and_by_row() -> None:
    adapted = with_adapter(LoraConfig(r=RANK, lora_dropout=0.5))
    rngs = jax.random.split(jax.random.key(3), 3)
    x = inputs(3)
    dropped = adapted(x, rngs)
    assert not np.allclose(dropped, adapted(x))
    np.testing.assert_allclose(adapted(x[1:2], rngs[1:2]), dropped[1:2], atol=ATOL)
    graphdef, variables = split(adapted)
    base: LoraLinear = merge(graphdef, variables | {"lora_b": jnp.zeros((D_OUT, RANK))})
    np.testing.assert_array_equal(base(x, rngs), base(x))


def test_dropout_keeps_the_mean() -> None:
    adapted = with_adapter(LoraConfig(r=RANK, lora_dropout=0.3))
    x = jnp.broadcast_to(inputs(1), (4000, 5, D_IN))
    mean = jnp.mean(adapted(x, jax.random.split(jax.random.key(4), 4000)), axis=0)
    np.testing.assert_allclose(mean, adapted(x[:1])[0], atol=0.15)


def test_default_targets_are_query_and_value() -> None:
    assert LoraConfig().targets == {"query", "value"}
    assert LoraConfig(target_modules=tuple(TARGET_NAMES)).targets == set(TARGET_NAMES.values())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"bias": "all"}, "'all'"),
        ({"r": 0}, "lora.r: expected at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout: .* got 1.0"),
        ({"target_modules": ("q_proj", "embed_tokens")}, "embed_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoraConfig(**wrong)


SAVED_BY_PEFT = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "Qwen/Qwen3-1.7B",
    "bias": "none",
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "self_attn.o_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


SAVED_BY_PEFT_0_21 = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
"""What it saves besides, with its defaults."""


def test_what_a_newer_peft_notes_besides_is_read() -> None:
    saved = SAVED_BY_PEFT | SAVED_BY_PEFT_0_21
    assert build(LoraConfig, saved, "model.lora") == build(LoraConfig, SAVED_BY_PEFT, "model.lora")
    untyped = build(LoraConfig, {**saved, "task_type": None}, "model.lora")
    assert untyped == build(LoraConfig, saved, "model.lora")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arrow_config", {"top_k": 3}),
        ("alora_invocation_tokens", [1]),
        ("use_bdlora", {"nblocks": 1}),
        ("lora_ga_config", {"scale": "unit"}),
        ("enable_lora", [True, False]),
        ("peft_versions", "1"),
    ],
)
def test_what_a_newer_peft_would_compute_is_refused(key: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"model\.lora\.{key}: "):
        build(LoraConfig, SAVED_BY_PEFT | {key: value}, "model.lora")


def test_a_saved_adapter_config_of_peft_is_read() -> None:
    config = build(LoraConfig, SAVED_BY_PEFT, "model.lora")
    assert (config.r, config.scale) == (4, 8.0)
    assert config.targets == {"query", "output"}
    everything = build(LoraConfig, {"target_modules": "all-linear"}, "model.lora")
    assert everything.targets == set(TARGET_NAMES.values())
    assert build(LoraConfig, {"target_modules": "v_proj"}, "model.lora").targets == {"value"}
    with pytest.raises(SettingsError, match=r"model\.lora\.use_dora: only plain LoRA"):
        build(LoraConfig, {**SAVED_BY_PEFT, "use_dora": True}, "model.lora")
