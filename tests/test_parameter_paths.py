"""Freeze patterns choose what NeMo's choose, down to single layers of a stack."""

import json

import numpy as np
import pytest

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.salm import salm_table
from speechlm2_jax.parameter_paths import NamedSlice, PatternError, Selection, select
from tests.conversion.goldens import NAMES, SALM, config_json, salm_config, salm_infos


def named(name, path, layer=None, is_buffer=False, is_alias=False):
    return NamedSlice(name, path, layer, is_buffer, is_alias)


SLICES = [
    *(named(f"llm.layers.{i}.q.weight", "llm.layers.query", i) for i in range(3)),
    named("llm.lm_head.weight", "llm.embedding"),
    named("embed_tokens.weight", "llm.embedding", is_alias=True),
    named("perception.fb", "perception.filterbank", is_buffer=True),
    named("perception.proj.weight", "perception.projection"),
]


def trained_names(slices: list[NamedSlice], selection: Selection) -> set[str]:
    def is_trained(s: NamedSlice) -> bool:
        mask = selection.trainable[s.path]
        return bool(mask if isinstance(mask, bool) else mask[s.layer])

    return {s.name for s in slices if s.is_parameter and is_trained(s)}


def choose(freeze, prevent=()) -> dict:
    chosen = select(SLICES, freeze, prevent).trainable
    return {p: m if isinstance(m, bool) else m.tolist() for p, m in chosen.items()}


def test_without_patterns_all_parameters_are_trained_and_no_buffer():
    assert choose([]) == {
        "llm.layers.query": True,
        "llm.embedding": True,
        "perception.projection": True,
    }


def test_some_layers_of_a_stack_are_frozen_by_a_mask():
    assert choose([r"^llm\.layers\.[01]\."])["llm.layers.query"] == [False, False, True]
    assert choose([r"^llm\.layers\.\d+\."])["llm.layers.query"] is False


def test_prevent_overrides_freeze():
    assert choose([r"^llm\..+$"], [r"^.+\.1\.q\."])["llm.layers.query"] == [False, True, False]
    assert choose([r".*"], [r"perception\.proj"])["perception.projection"] is True


def test_patterns_match_at_the_start_only():
    assert choose([r"llm"])["llm.embedding"] is False
    with pytest.raises(PatternError):
        choose([r"lm_head"])


def test_tied_tensor_follows_the_name_of_its_parameter():
    assert choose([r"^llm\.lm_head"])["llm.embedding"] is False
    chosen = select(SLICES, [r"^embed_tokens\..+$"], [])
    assert chosen.trainable["llm.embedding"] is True
    assert len(chosen.notes) == 1 and "embed_tokens.weight" in chosen.notes[0]


def test_pattern_that_matches_only_buffers_is_reported_once():
    chosen = select(SLICES, [r"^perception\.fb", r"^perception\.fb"], [])
    assert len(chosen.notes) == 1 and "perception.fb" in chosen.notes[0]
    assert all(chosen.trainable.values())


@pytest.mark.parametrize("key", ["freeze_params", "prevent_freeze_params"])
def test_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(key):
    patterns = {"freeze_params": [], "prevent_freeze_params": [], key: [r"^llm\.layer\.0\.q\..+$"]}
    with pytest.raises(PatternError, match=rf"{key}.*llm\.layers\.0\.q\.weight"):
        select(SLICES, patterns["freeze_params"], patterns["prevent_freeze_params"])


def test_what_is_no_regular_expression_is_an_error():
    with pytest.raises(PatternError, match="no regular expression"):
        choose(["(llm"])


@pytest.mark.parametrize(
    ("golden", "network", "has_lora"),
    [
        *((name, name, True) for name in NAMES),
        ("llama_full", "llama_adapter", False),
        ("qwen3_tied_full", "qwen3_lora", False),
    ],
)
def test_trainable_parameters_equal_nemos(golden, network, has_lora):
    expected = json.loads((SALM / f"{golden}.json").read_text())
    config = salm_config(network, lora=has_lora)
    infos = salm_infos(config)
    slices = mapping.names(salm_table(config), infos)
    block = config_json(network) if has_lora else expected["cfg_in"]
    selection = select(slices, block["freeze_params"], block["prevent_freeze_params"])
    trained = trained_names(slices, selection)
    assert trained == set(expected["trainable"])
    sizes = {
        s.name: np.prod(infos[s.path].shape[1:] if s.layer is not None else infos[s.path].shape)
        for s in slices
        if s.is_parameter
    }
    assert sum(sizes[name] for name in trained) == expected["n_trainable"]
    assert sum(sizes.values()) == expected["n_total"]


def test_names_equal_nemos_named_parameters():
    for name in NAMES:
        expected = json.loads((SALM / f"{name}.json").read_text())["named_parameters"]
        config = salm_config(name)
        slices = mapping.names(salm_table(config), salm_infos(config))
        assert {s.name for s in slices if s.is_parameter} == set(expected)
