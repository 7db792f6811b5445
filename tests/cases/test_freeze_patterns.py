"""A freeze pattern matches as `re.match` does, and its search always ends."""

import time

import pytest

from speechlm2_jax import parameter_paths
from speechlm2_jax.parameter_paths import NamedSlice, PatternError, select

NAMES = [
    *(f"llm.model.layers.{i}.self_attn.{p}_proj.weight" for i in range(24) for p in "qkvo"),
    *(f"perception.encoder.layers.{i}.conv.pointwise_conv1.weight" for i in range(24)),
    "perception.proj.weight",
]
SLICES = [NamedSlice(name, name, None, False, False) for name in NAMES]


def frozen(*patterns: str) -> set[str]:
    return {name for name, trained in select(SLICES, patterns, []).trainable.items() if not trained}


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(([a-z_]+[.]?[0-9]*)+)+$!",
        r"(.|.)*[!-]",
        r"^(([a-z_]+[.]?[0-9]*)+)+[!-]",
        r"(?:(?:(?:.?){9}){9}){9}[!-]",
        r"^(?=(.|.)*[!-])",
    ],
)
@pytest.mark.parametrize("key", ["freeze", "prevent"])
def test_pattern_that_would_never_end_is_refused_by_name(monkeypatch, pattern, key):
    monkeypatch.setattr(parameter_paths, "SEARCH_S", 0.2)
    start = time.process_time()
    with pytest.raises(PatternError) as error:
        select(SLICES, **{"freeze": [], "prevent": [], key: [pattern]})
    assert pattern in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - start < 2.0  # of all names together, not of each


def test_all_patterns_of_a_model_share_one_limit(monkeypatch):
    monkeypatch.setattr(parameter_paths, "SEARCH_S", 0.2)
    slow = [rf"(.|.){{18}}[!-]|llm|{n}" for n in range(200)]
    start = time.process_time()
    with pytest.raises(PatternError, match="takes more than"):
        select(SLICES, slow, [])
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?:(?:a){1000}){1000}){1000}",
        ".{100000000}",
        "a{" + "9" * 5000 + "}",
        "(" * 5000 + "a" + ")" * 5000,
        "(a",
    ],
)
def test_pattern_that_cannot_be_held_is_refused_in_one_short_line(pattern):
    with pytest.raises(PatternError, match="freeze_params: ") as error:
        select(SLICES, [pattern], [])
    assert len(str(error.value)) < 500


def test_look_arounds_of_nemo_choose_as_in_nemo():
    but_first = r"^llm\.(?!model\.layers\.(?:0|1)\.).+$"
    kept = {n for n in NAMES if n.startswith(("llm.model.layers.0.", "llm.model.layers.1."))}
    assert frozen(but_first) == {n for n in NAMES if n.startswith("llm.")} - kept
    assert frozen(r".+(?<=q_proj)\.weight$") == {n for n in NAMES if n.endswith("q_proj.weight")}
    some = frozen(r"^perception\.encoder\.layers\.(?:[0-9]|1[0-1])\.")
    assert len(some) == 12


def test_a_brace_that_counts_nothing_is_a_letter():
    assert frozen(r"perception\.proj\.weighs{e<=1}|llm") == {n for n in NAMES if "llm" in n}
    assert len(frozen(r"^llm\.model\.layers\.\d{2}\.")) == 14 * 4
