"""Dataclasses from plain values: every mistake is one line with its dotted path."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from speechlm2_jax import settings
from speechlm2_jax.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class Adapter:
    TARGETS: ClassVar[tuple[str, ...]] = ("ConformerEncoder",)
    ALIASES: ClassVar[Mapping[str, str]] = {"layers": "n_layers"}
    IGNORED: ClassVar[Mapping[str, Any]] = {
        "foreach": "torch only",
        "zoneout_prob": ("training goes on without it", 0),
    }
    REFUSED: ClassVar[Mapping[str, Any]] = {
        "use_rnn": "recurrent adapters are not built; remove it",
        "reduction": ("reduction is not built; set 1", 1),
    }
    n_layers: int = 2
    dropout: float = 0.0
    context: tuple[int, ...] = (-1, -1)
    norm: Literal["batch_norm", "layer_norm"] = "batch_norm"
    width: int | None = None

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise ValueError(f"n_layers={self.n_layers} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    TARGETS: ClassVar[tuple[str, ...]] = ("AdamW", "Adam")
    lr: float
    target: str = "AdamW"


@dataclass(frozen=True, kw_only=True)
class Identity:
    TARGETS: ClassVar[tuple[str, ...]] = ("IdentityConnector",)
    d_model: int | None = None


@dataclass(frozen=True, kw_only=True)
class Perception:
    adapter: Adapter | Identity


@dataclass(frozen=True, kw_only=True)
class Model:
    adapter: Adapter = field(default_factory=Adapter)
    optimizer: Optimizer | None = None
    bins: tuple[float, ...] | None = None
    pair: tuple[int, int] = (1, 2)
    extra: Mapping[str, Any] = field(default_factory=dict)
    stop: int | tuple[int, ...] | None = None
    contexts: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()
    name: str = "model"
    verbose: bool = False
    normalizer: str | bool = "english"
    folder: Path | None = None


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SettingsError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_become_nested_dataclasses_and_back():
    values = {
        "adapter": {"_target_": "nemo.x.ConformerEncoder", "layers": 4, "context": [70, 1]},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": "3e-4"},
        "bins": [1, 2.5],
        "pair": [3, 4],
        "extra": {"anything": [1]},
        "stop": [1, 2],
        "contexts": [[1], [2, 3]],
        "normalizer": False,
        "folder": "a/b",
    }
    model = settings.build(Model, values)
    assert model == Model(
        adapter=Adapter(n_layers=4, context=(70, 1)),
        optimizer=Optimizer(target="Adam", lr=3e-4),
        bins=(1.0, 2.5),
        pair=(3, 4),
        extra={"anything": [1]},
        stop=(1, 2),
        contexts=((1,), (2, 3)),
        normalizer=False,
        folder=Path("a/b"),
    )
    assert type(model.bins[0]) is float
    plain = settings.to_plain(model)
    assert plain["adapter"]["context"] == [70, 1]
    assert plain["folder"] == "a/b"
    assert settings.build(Model, plain) == model


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"adapter": {"n_layer": 3}},
            "model.adapter.n_layer: unknown key; did you mean 'n_layers'?",
        ),
        ({"zzz": 3}, "model.zzz: unknown key; valid keys: adapter, bins, contexts, extra, folder, "
                     "name, normalizer, optimizer, pair, stop, verbose"),
        ({"adapter": {"n_layers": "two"}}, "model.adapter.n_layers: expected int, got 'two' (str)"),
        ({"adapter": {"n_layers": True}}, "model.adapter.n_layers: expected int, got True (bool)"),
        ({"adapter": {"n_layers": 2.5}}, "model.adapter.n_layers: expected int, got 2.5 (float)"),
        ({"adapter": {"n_layers": "8"}}, "model.adapter.n_layers: expected int, got '8' (str)"),
        ({"adapter": {"n_layers": None}}, "model.adapter.n_layers: expected int, got null"),
        ({"adapter": {"n_layers": 0}}, "model.adapter: n_layers=0 must be at least 1"),
        ({"adapter": {"dropout": "x"}}, "model.adapter.dropout: expected float, got 'x' (str)"),
        ({"adapter": {"dropout": True}}, "model.adapter.dropout: expected float, got True (bool)"),
        ({"adapter": {"width": "x"}}, "model.adapter.width: expected int or null, got 'x' (str)"),
        ({"adapter": {"context": [1, "x"]}},
         "model.adapter.context.1: expected int, got 'x' (str)"),
        ({"adapter": {"context": 1}}, "model.adapter.context: expected a list, got 1 (int)"),
        ({"adapter": {"context": "12"}}, "model.adapter.context: expected a list, got '12' (str)"),
        (
            {"adapter": {"norm": "group"}},
            "model.adapter.norm: expected one of 'batch_norm', 'layer_norm', got 'group' (str)",
        ),
        ({"adapter": 1}, "model.adapter: expected a mapping of keys, got 1 (int)"),
        ({"adapter": {"layers": 1, "n_layers": 2}},
         "model.adapter.n_layers: sets 'n_layers' a second time; keep one of the two names"),
        ({"optimizer": {}}, "model.optimizer.lr: required (float)"),
        ({"optimizer": 3}, "model.optimizer: expected a mapping or null, got 3 (int)"),
        ({"optimizer": {"lr": [1]}}, "model.optimizer.lr: expected float, got a list"),
        (
            {"optimizer": {"lr": 1, "_target_": "os.system"}},
            "model.optimizer._target_: unsupported 'os.system' (str); use AdamW or Adam",
        ),
        ({"bins": [1, "x"]}, "model.bins.1: expected float, got 'x' (str)"),
        ({"contexts": [[1], ["x"]]}, "model.contexts.0: expected int, got a list"),
        ({"pair": [1]}, "model.pair: expected 2 values, got 1"),
        ({"verbose": 1}, "model.verbose: expected bool, got 1 (int)"),
        ({"name": 1}, "model.name: expected str, got 1 (int)"),
        ({"name": {}}, "model.name: expected str, got a mapping"),
        ({"_target_": "x"}, "model._target_: unknown key; valid keys: adapter, bins, contexts, "
                            "extra, folder, name, normalizer, optimizer, pair, stop, verbose"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_path(values, expected):
    assert message(settings.build, Model, values, "model") == expected


def test_a_target_chooses_among_dataclasses_and_its_mistakes_are_its_own():
    def adapter(**values):
        return {"adapter": values}

    built = settings.build(Perception, adapter(_target_="x.IdentityConnector", d_model=4))
    assert built.adapter == Identity(d_model=4)
    assert message(
        settings.build, Perception, adapter(_target_="x.IdentityConnector", d_modl=4), "p"
    ) == ("p.adapter.d_modl: unknown key; did you mean 'd_model'?")
    assert message(
        settings.build, Perception, adapter(_target_="x.ConformerEncoder", d_model=4), "p"
    ).startswith("p.adapter.d_model: unknown key; valid keys: context, dropout")
    assert message(settings.build, Perception, adapter(_target_="x.Qformer"), "p") == (
        "p.adapter._target_: unsupported 'x.Qformer' (str); "
        "use ConformerEncoder or IdentityConnector"
    )


def test_whole_floats_serve_as_integers_and_integers_as_floats():
    adapter = settings.build(Adapter, {"n_layers": 1e1, "dropout": 1})
    assert (adapter.n_layers, type(adapter.n_layers)) == (10, int)
    assert (adapter.dropout, type(adapter.dropout)) == (1.0, float)


def test_ignored_keys_are_reported_once_with_their_reason():
    with settings.ignored_report() as report:
        settings.build(Model, {"adapter": {"foreach": True}}, "model")
        settings.build(Model, {"adapter": {"foreach": True}}, "model")
    assert report == {"model.adapter.foreach": "torch only"}
    settings.build(Model, {"adapter": {"foreach": True}}, "model")
    assert len(report) == 1


def test_an_ignored_key_that_asks_for_nothing_is_not_reported():
    with settings.ignored_report() as report:
        for value in (0, 0.0, None):
            settings.build(Adapter, {"zoneout_prob": value})
        assert not report
        settings.build(Adapter, {"zoneout_prob": 0.1}, "adapter")
    assert report == {"adapter.zoneout_prob": "training goes on without it"}


@pytest.mark.parametrize("value", [None, False, 0, "", []])
def test_a_refused_key_that_asks_for_nothing_is_accepted(value):
    assert settings.build(Adapter, {"use_rnn": value}) == Adapter()
    assert settings.build(Adapter, {"reduction": 1}) == Adapter()


def test_a_refused_key_has_a_reason():
    assert message(settings.build, Adapter, {"use_rnn": True}, "model.adapter") == (
        "model.adapter.use_rnn: recurrent adapters are not built; remove it (got True)"
    )
    assert message(settings.build, Adapter, {"reduction": 2}, "a") == (
        "a.reduction: reduction is not built; set 1 (got 2)"
    )


def test_defaults_show_required_fields_as_missing():
    assert settings.defaults(Optimizer) == {"lr": "???", "target": "AdamW"}
