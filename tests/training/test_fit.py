"""Whole runs: what they write, keep, skip and say."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from speechlm2_jax.batches import LossSum
from speechlm2_jax.checkpointing import load_weights
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.loop import MAX_SKIPPED_IN_A_ROW, NonFiniteRun
from speechlm2_jax.training.run import preparation
from speechlm2_jax.training.run.throughput import COMPUTE, KINDS, Throughput
from speechlm2_jax.training.trainer_config import TrainerConfig
from tests.training.toy import ToyData, ToyModel, make_batch, make_trainer, rows_of, variables

SCHEDULE = {
    "_target_": "nemo.core.optim.lr_scheduler.CosineAnnealing",
    "max_steps": 6,
    "warmup_steps": 2,
    "min_lr": 1e-4,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of six steps, whose files many tests read."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    model = ToyModel(dropout=0.2, lr_scheduler=SCHEDULE)
    data = ToyData(lengths=(5, 7), dropped={"unreadable": 2})
    result = make_trainer(run_dir, max_steps=6).fit(model, data)
    return run_dir, model, result


def test_run_directory_holds_what_was_asked_and_where(finished):
    run_dir, _, _ = finished
    names = {p.name for p in run_dir.iterdir()}
    assert names >= {
        "config.yaml", "command.txt", "environment.txt", "train.log", "metrics.jsonl", "checkpoints"
    }  # fmt: skip
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert set(config) == {"model", "trainer", "data", "exp_manager"}
    assert config["model"]["kind"] == "toy" and config["trainer"]["max_steps"] == 6
    assert "jax " in (run_dir / "environment.txt").read_text()
    assert sys.executable in (run_dir / "command.txt").read_text()


def test_rows_hold_the_learning_rate_used_and_the_norm_before_clipping(finished):
    run_dir, _, _ = finished
    training, _ = rows_of(run_dir)
    assert list(training) == [1, 2, 3, 4, 5, 6]
    rates = [row["learning_rate"] for row in training.values()]
    base = 1e-2
    assert rates[:3] == pytest.approx([base / 3, base * 2 / 3, base])
    assert max(row["grad_norm"] for row in training.values()) > 1.0  # gradient_clip_val
    wanted = {
        "step", "loss", "learning_rate", "grad_norm", "acc", "tokens_per_s_per_device", "mfu",
        "data_wait_share", "padding", "step_time_s", "skipped", "dropped",
    }  # fmt: skip
    assert all(set(row) == wanted for row in training.values())
    assert training[1]["dropped"] == 2
    batch = make_batch(0, groups=1)
    padding = 1 - batch.arrays["mask"].mean()
    assert training[1]["padding"] == pytest.approx(padding)


def test_validation_rows_hold_each_set_and_the_mean_over_sets(finished):
    run_dir, _, result = finished
    _, validation = rows_of(run_dir)
    assert list(validation) == [3, 6]  # limit_train_batches=3, the end included once
    for row in validation.values():
        for metric in ("loss", "acc"):
            mean = (row[f"val_{metric}_clean"] + row[f"val_{metric}_noisy"]) / 2
            assert row[f"val_{metric}"] == pytest.approx(mean)
    assert result.metrics["val_loss"] == validation[6]["val_loss"]


def test_last_row_holds_where_the_time_went(finished):
    run_dir, _, _ = finished
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    kinds = (COMPUTE, *KINDS)
    assert sum(last[f"time_{kind}_s"] for kind in kinds) == pytest.approx(last["time_total_s"])
    assert {key for key in last if key.startswith("time_")} == {
        *(f"time_{kind}_s" for kind in kinds), "time_total_s", "time_ended"
    }  # fmt: skip
    assert last["goodput"] == pytest.approx(last["time_compute_s"] / last["time_total_s"])


def test_waiting_for_data_is_all_counted_and_counted_as_nothing_else(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(preparation, "Throughput", partial(Throughput, clock=lambda: now[0]))

    class Slow(ToyData):  # only its batches take time
        def batch(self, index):
            now[0] += 2.0
            return super().batch(index)

        def validation_batches(self):
            def slow(batches):
                for batch in batches:
                    now[0] += 3.0
                    yield batch

            return {name: slow(batches) for name, batches in super().validation_batches().items()}

    options = {"max_steps": 4, "accumulate_grad_batches": 2, "limit_train_batches": 4}
    make_trainer(tmp_path, **options).fit(ToyModel(dropout=0.2), Slow())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["data_wait_share"] for row in rows if "loss" in row] == [1.0] * 4
    last = rows[-1]
    started = last.pop("time_starting_s")  # by the real clock, before the run has its own
    last["time_total_s"] -= started
    spent = {
        key: v for key, v in last.items() if key.startswith("time_") and key[-2:] == "_s" and v
    }
    validations, batches = 2, 2 + 3
    waited = {"time_data_wait_s": 16.0, "time_validation_data_wait_s": 3.0 * validations * batches}
    assert spent == pytest.approx({**waited, "time_total_s": sum(waited.values())})


def test_log_has_one_line_per_step_with_the_named_quantities(finished):
    run_dir, _, _ = finished
    lines = [s for s in (run_dir / "train.log").read_text().splitlines() if "grad norm" in s]
    assert len(lines) == 6
    words = ("step 6/6", "loss", "lr", "tokens/s/device", "mfu", "data wait", "padding")
    assert all(word in lines[-1] for word in words)


def test_model_ends_with_trained_and_its_own_frozen_arrays(finished):
    run_dir, model, result = finished
    start = variables()
    np.testing.assert_array_equal(model.variables["embedding.weight"], start["embedding.weight"])
    assert np.abs(np.array(model.variables["head.weight"]) - start["head.weight"]).max() > 1e-3
    assert int(model.variables["norm.batches_tracked"]) == 6
    saved = load_weights(run_dir, "last")
    assert saved.step == 6 == result.step and saved.settings == model.settings
    for path, value in model.variables.items():
        np.testing.assert_array_equal(saved.variables[path], value)
    assert result.is_finished


def test_finished_run_prints_how_to_extend_it(finished, capsys):
    run_dir, trained, _ = finished
    before = (run_dir / "metrics.jsonl").read_text()
    model = ToyModel(dropout=0.2, lr_scheduler=SCHEDULE)
    result = make_trainer(run_dir, max_steps=6).fit(model, ToyData())
    assert "this run is finished: 6 steps" in capsys.readouterr().out
    assert "raise trainer.max_steps" in result.reason and result.is_finished
    assert (run_dir / "metrics.jsonl").read_text() == before
    for path, value in trained.variables.items():
        np.testing.assert_array_equal(model.variables[path], value)


def test_a_skipped_step_is_counted_and_its_conversations_named(tmp_path, capsys):
    data = ToyData(bad={2: np.nan, 3: np.inf})
    make_trainer(tmp_path, max_steps=6).fit(ToyModel(dropout=0.2), data)
    output = capsys.readouterr().out
    assert "step 3 skipped (not finite" in output and "b2-first, b2-second" in output
    training, _ = rows_of(tmp_path)
    assert [row["skipped"] for row in training.values()] == [0, 0, 1, 2, 2, 2]
    assert training[3]["loss"] is None  # JSON has no NaN


def test_twenty_skipped_in_a_row_save_say_so_and_exit_with_one(tmp_path, capsys):
    data = ToyData(bad=dict.fromkeys(range(2, 100), np.nan))
    trainer = make_trainer(tmp_path, max_steps=60, limit_train_batches=60, log_every_n_steps=5)
    with pytest.raises(NonFiniteRun) as raised:
        trainer.fit(ToyModel(dropout=0.2), data)
    assert raised.value.code == 1
    assert f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped" in capsys.readouterr().out
    saved = load_weights(tmp_path, "last")
    assert 22 <= saved.step <= 26 and int(saved.variables["norm.batches_tracked"]) == 2
    again = make_trainer(tmp_path, max_steps=saved.step + 2)
    data.bad = {}
    assert again.fit(ToyModel(dropout=0.2), data).is_finished


def test_training_ends_where_the_data_ends(tmp_path):
    data = ToyData(length=4)
    result = make_trainer(tmp_path, max_steps=6).fit(ToyModel(dropout=0.2), data)
    assert result.step == 4 and "data ended" in result.reason
    assert list(rows_of(tmp_path)[1]) == [3, 4]


def test_time_limit_saves_and_stops(tmp_path, capsys):
    trainer = make_trainer(tmp_path, experiment={"max_time_per_run": "00:00:00:00"})
    result = trainer.fit(ToyModel(dropout=0.2), ToyData())
    assert not result.is_finished and "time limit" in result.reason
    assert load_weights(tmp_path, "last").step == result.step == 1
    assert "the same command resumes" in capsys.readouterr().out


def test_accumulation_counts_micro_batches_and_flushes_at_the_epoch(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, limit_train_batches=3, accumulate_grad_batches=2)
    trainer.fit(ToyModel(dropout=0.2), ToyData())
    assert list(rows_of(tmp_path)[1]) == [2, 4]  # steps of 2 and 1 micro-batches, twice
    assert int(load_weights(tmp_path, "last").variables["norm.batches_tracked"]) == 6


def test_host_metrics_join_the_validation_with_current_weights(tmp_path):
    seen = []
    model = ToyModel(dropout=0.2)

    def count_errors(batch):
        seen.append(np.array(model.variables["head.weight"]))
        return LossSum(total=float(len(seen)), count=2.0)

    model.validation_metrics = {"wer": count_errors}
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        limit_val_batches=1,
        experiment={"checkpoint_callback_params": {"monitor": "val_wer"}},
    )
    trainer.fit(model, ToyData())
    row = rows_of(tmp_path)[1][3]
    assert (row["val_wer_clean"], row["val_wer_noisy"], row["val_wer"]) == (0.5, 1.0, 0.75)
    np.testing.assert_array_equal(seen[-1], model.variables["head.weight"])


def test_sanity_validation_comes_first_and_leaves_no_row(tmp_path, capsys):
    data = ToyData()
    make_trainer(tmp_path, max_steps=1, num_sanity_val_steps=1).fit(ToyModel(dropout=0.2), data)
    assert "sanity validation passed" in capsys.readouterr().out
    assert list(rows_of(tmp_path)[1]) == [1]


def test_a_monitor_that_is_no_metric_is_refused_before_training(tmp_path):
    trainer = make_trainer(
        tmp_path,
        num_sanity_val_steps=1,
        experiment={"checkpoint_callback_params": {"monitor": "val_bleu"}},
    )
    with pytest.raises(SettingsError, match="val_bleu.*choose one of val_acc"):
        trainer.fit(ToyModel(dropout=0.2), ToyData())
    assert not rows_of(tmp_path)[0]


@pytest.mark.parametrize(("precision", "products"), [("32-true", "highest"), ("bf16", None)])
def test_fp32_products_are_full_and_only_while_training(precision, products):
    seen = []

    class Watched(ToyModel):
        def losses(self, variables, batch, *, key, train):
            seen.append((jax.config.jax_default_matmul_precision, self.compute_dtype))
            return super().losses(variables, batch, key=key, train=train)

    trainer = make_trainer(max_steps=1, precision=precision, limit_val_batches=0)
    trainer.fit(Watched(), ToyData())
    dtype = jnp.float32 if precision == "32-true" else jnp.bfloat16
    assert set(seen) == {(products, dtype)}
    assert jax.config.jax_default_matmul_precision is None


def test_without_a_run_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = make_trainer(max_steps=2).fit(ToyModel(dropout=0.2), ToyData())
    assert result.is_finished and not list(tmp_path.iterdir())


def test_validate_gives_the_metrics_of_the_model_as_it_is(finished):
    _, model, result = finished
    metrics = make_trainer().validate(model, ToyData(lengths=(5, 7)))
    assert metrics == pytest.approx(result.metrics)


def test_checkpoints_of_another_run_are_not_overwritten(finished):
    run_dir, _, _ = finished
    with pytest.raises(SettingsError, match="resume_if_exists"):
        make_trainer(run_dir, experiment={"resume_if_exists": False})


def test_resuming_nothing_is_an_error_unless_allowed(tmp_path):
    with pytest.raises(SettingsError, match="resume_ignore_no_checkpoint"):
        make_trainer(tmp_path, experiment={"resume_ignore_no_checkpoint": False})


def test_a_run_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SettingsError, match="cannot be written"):
        make_trainer(tmp_path / "file" / "run")


def test_a_trace_of_some_steps_is_written_and_told(tmp_path, capsys):
    make_trainer(tmp_path / "run", max_steps=4, profile_steps=(2, 3)).fit(ToyModel(), ToyData())
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert "trace of steps 2 to 3" in capsys.readouterr().out


def test_a_trace_ends_with_the_run(tmp_path):
    make_trainer(tmp_path / "run", max_steps=2, profile_steps=(2, 9)).fit(ToyModel(), ToyData())
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", [(0, 3), (5, 4)])
def test_steps_of_a_trace_that_cannot_be_are_refused(steps):
    with pytest.raises(ValueError, match="first and the last step"):
        TrainerConfig(max_steps=1, profile_steps=steps)
