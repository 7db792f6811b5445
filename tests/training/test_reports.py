"""Means over validation sets, throughput, and rows of metrics."""

import json

import numpy as np
import pytest

from speechlm2_jax.batches import LossSum
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.metrics_log import MetricsLog, drop_rows_after
from speechlm2_jax.training.run.throughput import Throughput, peak_flops
from speechlm2_jax.training.validation import Interrupted, Validator, take
from tests.training.toy import make_batch, make_trainer

SUMS = [LossSum(total=np.float32(t), count=np.float32(c)) for t, c in ((6, 2), (1, 1), (0, 0))]
SETS = {"a": [make_batch(0), make_batch(1)], "b": [make_batch(2)]}


def evaluate(batch):
    by_id = {"b0-first": SUMS[0], "b1-first": SUMS[1], "b2-first": SUMS[2]}
    return {"loss": by_id[batch.ids[0]]}


def validate(sets, **options):
    validator = Validator(**{"host_metrics": {}, "nemo_exact": False, **options})
    return validator.run(sets, evaluate).metrics


def test_a_set_is_the_mean_over_elements():
    assert validate({"a": SETS["a"]}) == {"val_loss": 7 / 3, "val_loss_a": 7 / 3}


def test_nemo_exact_takes_the_mean_of_batch_means():
    assert validate({"a": SETS["a"]}, nemo_exact=True)["val_loss"] == (3 + 1) / 2


def test_a_set_with_nothing_to_score_is_left_out():
    assert "val_loss_b" not in validate(SETS)


def test_limits_are_batches_or_a_part_of_a_set():
    batches = [make_batch(i) for i in range(4)]
    for limit, expected in ((3, 3), (0.5, 2), (1.0, 4), (None, 4), (-1, 4), (9, 4)):
        assert len(list(take(batches, limit, "a"))) == expected
    with pytest.raises(SettingsError, match="length is unknown"):
        take(iter(batches), 0.5, "a")


def test_validation_can_be_interrupted():
    with pytest.raises(Interrupted):
        validate(SETS, should_stop=lambda: True)


def test_time_by_kind_adds_up_and_rates_leave_out_what_is_not_training():
    now = [0.0]
    throughput = Throughput(2 * ["NVIDIA H100 80GB HBM3"], clock=lambda: now[0])

    def spend(kind, seconds):
        with throughput.measure(kind):
            now[0] += seconds

    spend("data_wait", 1.0)
    spend("saving", 100.0)
    with throughput.measure("validation"):
        now[0] += 5.0
        spend("compiling", 50.0)
    now[0] += 3.0
    throughput.add_batch(tokens=60, padded=80, flops=2 * 4 * 989e12 / 10)
    throughput.add_step()
    rates = throughput.rates()
    assert rates.tokens_per_s_per_device == pytest.approx(60 / 4 / 2)
    assert rates.mfu == pytest.approx(0.1)
    assert rates.data_wait_share == pytest.approx(0.25) and rates.padding == pytest.approx(0.25)
    assert rates.step_time_s == pytest.approx(4.0)
    expected = {"compute": 3.0, "data_wait": 1.0, "compiling": 50.0, "validation": 5.0}
    unused = dict.fromkeys(("importing", "starting", "validation_data_wait", "rest"), 0.0)
    assert throughput.totals() == {**expected, **unused, "saving": 100.0}


def test_peaks_are_known_by_kind_and_unknown_for_cpus():
    assert peak_flops("NVIDIA H200") == 989e12 and peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None


def test_rows_are_json_and_resumable(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = MetricsLog(path, tensorboard=tmp_path / "tensorboard")
    for step in (1, 2, 3):
        rows.write({"step": step, "loss": float("nan") if step == 2 else 1.5})
    rows.close()
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    drop_rows_after(path, 2)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": None},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_wandb_that_is_not_installed_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(SettingsError, match=r"pip install 'speechlm2_jax\[wandb\]'"):
        make_trainer(tmp_path / "run", experiment={"create_wandb_logger": True})
    assert not (tmp_path / "run").exists()  # the error comes before anything is made
