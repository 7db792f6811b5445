"""Learning-rate schedules against NeMo 3.0.0, step by step."""

import json
from pathlib import Path

import pytest

from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.schedules import SCHEDULES, make_schedule

DATA = Path(__file__).parents[1] / "data"
GOLDENS = {
    **json.loads((DATA / "salm" / "lr_schedules.json").read_text()),
    **json.loads((DATA / "training" / "lr_schedules_more.json").read_text()),
}
RELATIVE = 1e-12  # both are double precision; only the order of operations differs


def class_of(name: str) -> str:
    return name.split("_")[0]


@pytest.mark.parametrize("name", GOLDENS)
def test_schedule_equals_nemo(name):
    golden = GOLDENS[name]
    target = f"nemo.core.optim.lr_scheduler.{class_of(name)}"
    schedule = make_schedule({"_target_": target, **golden["args"]}, golden["base_lr"])
    rates = [schedule(step) for step in range(len(golden["lr_used_at_step"]))]
    assert rates == pytest.approx(golden["lr_used_at_step"], rel=RELATIVE, abs=1e-18)


def test_every_schedule_has_a_golden():
    assert {class_of(name) for name in GOLDENS} == set(SCHEDULES)


def test_no_schedule_is_a_constant_rate():
    assert make_schedule(None, 3e-4)(12345) == 3e-4


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"_target_": "torch.optim.lr_scheduler.CyclicLR"}, "CyclicLR.*choose one of.*CosineAnn"),
        ({"_target_": "os.system"}, "unsupported 'os.system'"),
        ({"_target_": "x.CosineAnnealing", "max_steps": 9, "warmup": 1}, "did you mean 'warmup_"),
        ({"_target_": "x.CosineAnnealing"}, "max_steps is required"),
        (
            {
                "_target_": "x.CosineAnnealing",
                "max_steps": 9,
                "warmup_steps": 1,
                "warmup_ratio": 0.1,
            },
            "not both",
        ),
        ({"_target_": "x.NoamAnnealing", "max_steps": 9}, "d_model: required"),
        ({"_target_": "x.CosineAnnealing", "max_steps": 9, "last_epoch": 3}, "last_epoch"),
    ],
)
def test_bad_schedule_is_refused_by_name(block, message):
    with pytest.raises(SettingsError, match=message):
        make_schedule(block, 1e-3)


def test_minimum_above_the_base_rate_is_refused():
    block = {"_target_": "CosineAnnealing", "max_steps": 9, "min_lr": 1.0}
    with pytest.raises(SettingsError, match="min_lr"):
        make_schedule(block, 1e-3)
