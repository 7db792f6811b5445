"""A plan of a run: its bins hold the data, its rows fit, and train.py takes its YAML."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from speechlm2_jax import experiment
from speechlm2_jax.data import plan as command
from speechlm2_jax.data.bins import bin_of
from speechlm2_jax.data.config import DataLoaderConfig
from speechlm2_jax.data.index import row_count
from speechlm2_jax.planning import bins, plan, report
from speechlm2_jax.planning.options import PlanOptions
from speechlm2_jax.settings import SettingsError
from tests.training.tiny_salm import write_config

DEFAULTS = Path(__file__).parents[1] / "data" / "from_nemo" / "loader_defaults.json"
TRAINER = {
    "max_steps": 3,
    "precision": "32-true",
    "limit_val_batches": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "compilation_cache_dir": None,
}
GIB = 2**30


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, trainer=TRAINER)


@pytest.fixture
def compiled(monkeypatch):
    """Programs are not compiled: each needs 1 MiB, and 0.5 MiB for 100 positions of a row."""
    batches = []

    def memory_of(self, prepared, members, rows, name):
        shape = plan.shape_with(prepared, members, rows)
        batches.append(shape)
        self.compilations += 1
        return 2**20 * (1 + rows * shape.tokens / 200)

    monkeypatch.setattr(plan.Planner, "_memory_of", memory_of)
    return batches


def run(config, tmp_path, *options):
    path = tmp_path / "plan.yaml"
    command.main([str(config), "--no-timing", "--output", str(path), *options])
    return yaml.safe_load(path.read_text())["data"]["train_ds"]


def test_the_plan_names_the_command_that_trains_where_it_was_started(monkeypatch, capsys):
    planned = SimpleNamespace(keys={"batch_size": None})
    monkeypatch.setattr(plan, "make_plan", lambda run, options: planned)
    monkeypatch.setattr(report, "table", lambda plan: "")
    monkeypatch.setattr(report, "write_yaml", lambda path, plan, words: print(*words[:2]))
    argv = ["salm", "data.train_ds.batch_size=4", "trainer.max_steps=9"]
    for program, typed, train in (
        ("plan", "python -m", "python train.py"),
        ("speechlm2-jax plan", "speechlm2-jax plan", "speechlm2-jax train"),
    ):
        command.main(argv, program=program)
        out = capsys.readouterr().out.splitlines()
        assert typed in out
        assert out[-1] == f"{train} --config salm --config plan.yaml trainer.max_steps=9"


def test_the_yaml_has_nemos_keys_and_plans_the_shapes_that_were_compiled(
    config, tmp_path, compiled, capsys
):
    keys = run(config, tmp_path, "--buckets", "2", "--memory-gib", f"{4 / 1024}")
    assert keys["num_buckets"] == 2 == len(keys["bucket_duration_bins"])
    assert keys["max_tokens"] == keys["bucket_duration_bins"][-1]
    assert keys["use_bucketing"] is keys["use_multimodal_sampling"] is True
    assert keys["batch_size"] is None
    nemo = OmegaConf.merge(
        json.loads(DEFAULTS.read_text()), OmegaConf.load(tmp_path / "plan.yaml").data.train_ds
    )
    assert list(nemo.bucket_batch_size) == keys["bucket_batch_size"]

    settings = experiment.read_run(config, over=[tmp_path / "plan.yaml"])
    data = experiment.make_data(settings.values["data"], made := settings.build(dry_run=True).model)
    data.setup(frame_count=made.frame_count)
    shapes = [bucket.shape for bucket in data.plan().buckets]
    assert set(shapes) <= set(compiled)
    rows = [shape.sequences for shape in shapes]
    assert rows == keys["bucket_batch_size"]
    for shape, count in zip(shapes, data.plan().members, strict=True):
        most = int((0.6 * 4 - 1) * 200 / shape.tokens)
        assert shape.sequences == min(most, count.count)
    out = capsys.readouterr().out
    assert f"train.py --config {config} --config {tmp_path / 'plan.yaml'}" in out
    assert re.search(r"compiled \d programs for 2 bins", out)


def test_bins_of_the_configuration_are_kept_and_empty_ones_left_out(
    config, tmp_path, compiled, capsys
):
    over = tmp_path / "over.yaml"
    over.write_text("data: {train_ds: {use_multimodal_sampling: true}}")
    words = ["--config", str(over)]
    words += ["+data.train_ds.bucket_duration_bins=[5,40,41,500]", "--memory-gib", "1"]
    words += ["trainer.max_steps=3"]
    keys = run(config, tmp_path, *words, "--max-rows", "3")
    assert keys["bucket_duration_bins"] == [40, 500] and keys["bucket_batch_size"] == [3, 2]
    assert keys["max_tokens"] == 500  # of the two long conversations
    trains = capsys.readouterr().out.splitlines()[-1]  # these bins would replace the plan's
    files = f"--config {config} --config {over} --config {tmp_path / 'plan.yaml'}"
    assert trains.endswith(f"{files} trainer.max_steps=3")


def test_two_dimensional_bins_hold_every_conversation(config, tmp_path, compiled):
    keys = run(config, tmp_path, "--buckets-2d", "2,2", "--memory-gib", "1")
    pairs = keys["bucket_duration_bins"]
    assert pairs == sorted(pairs) and all(len(pair) == 2 for pair in pairs)
    assert len(keys["bucket_batch_size"]) == keys["num_buckets"] == len(pairs)
    settings = experiment.read_run(config, over=[tmp_path / "plan.yaml"])
    model = experiment.make_model(settings.values["model"], settings.near)
    data = experiment.make_data(settings.values["data"], model)
    data.setup(frame_count=model.frame_count)
    assert (data.plan().bucket_of >= 0).all() and len(data.plan().buckets) == len(pairs)


def test_pairs_hold_every_length_and_none_is_empty():
    rng = np.random.default_rng(0)
    inputs, outputs = rng.integers(1, 400, 500), rng.integers(0, 90, 500)
    found = bins.pairs(inputs, outputs, 5, 3)
    assert 5 <= len(found) <= 15
    for strict in (True, False):
        config = DataLoaderConfig(
            use_multimodal_sampling=True,
            bucket_duration_bins=tuple(map(tuple, found)),
            bucket_batch_size=(1,) * len(found),
            bucketing_2d_strict_mode=strict,
        )
        held = bin_of(config, inputs, outputs)
        assert held.max() < len(found)
        if strict:
            assert set(held.tolist()) == set(range(len(found)))


@pytest.mark.slow  # plans twice, and builds an index
@pytest.mark.parametrize("kind", [("--buckets", "2"), ("--buckets-2d", "2,2")])
def test_an_index_is_planned_as_a_list_is(config, tmp_path, compiled, monkeypatch, kind):
    options = (*kind, "--memory-gib", "0.01")
    listed = run(config, tmp_path, *options)
    monkeypatch.setattr(row_count, "LARGE_ROWS", 4)
    assert run(config, tmp_path, *options) == listed
    assert (tmp_path / "train.jsonl.index").is_dir()


REFUSED = {
    "data.train_ds.packed": ["+data.train_ds.packed=true"],
    "give one of them": ["--buckets", "2", "--buckets-2d", "2,2"],
    "--memory-fraction must be": ["--memory-fraction", "1.5"],
    "two numbers as in 5,3": ["--buckets-2d", "7"],
    "one row needs 0.00 GiB of 0.00 GiB": ["--memory-gib", "0.0001"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_planned_is_one_line(config, tmp_path, compiled, capsys, message):
    with pytest.raises(SystemExit) as raised:
        run(config, tmp_path, *REFUSED[message])
    assert raised.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("plan:")]
    assert len(err) == 1 and message in err[0]
    assert not (tmp_path / "plan.yaml").exists()


@pytest.mark.slow  # compiles a dozen programs
@pytest.mark.parametrize("accumulate", [1, 2])
def test_programs_fit_and_a_plan_trains(config, tmp_path, accumulate):
    """With real programs: the memory analysis of each is below the limit; less memory, fewer."""
    words = [f"+trainer.accumulate_grad_batches={accumulate}"]
    settings = experiment.read_run(config, words)
    options = PlanOptions(buckets=2, max_rows=64)
    free = plan.make_plan(settings, replace(options, memory_gib=1.0))
    assert all(one.memory_bytes <= 0.6 * GIB for one in free.bins)
    assert free.examples_per_s is not None and free.examples_per_s > 0
    # between what one row of the longest bin needs and what all need
    gib = (free.bins[-1].memory_bytes / GIB) * 0.97 / 0.9
    tight = plan.make_plan(
        settings, replace(options, memory_gib=gib, memory_fraction=0.9, is_timed=False)
    )
    assert all(one.memory_bytes <= tight.limit_bytes for one in tight.bins)
    pairs = list(zip(tight.bins, free.bins, strict=True))
    assert all(a.rows <= b.rows for a, b in pairs) and any(a.rows < b.rows for a, b in pairs)

    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"data": {"train_ds": dict(free.keys)}}))
    result = experiment.read_run(config, words, over=[path]).build().fit()
    assert result.step == 3
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


def test_shares_of_memory():
    assert PlanOptions().fraction_on("cpu") == 0.6 < PlanOptions().fraction_on("tpu") == 0.9
    assert PlanOptions(memory_fraction=0.5).fraction_on("cpu") == 0.5


def test_a_plan_needs_training_data(config):
    settings = experiment.read_run(config, ["~data.train_ds"])
    with pytest.raises(SettingsError, match="data.train_ds: required"):
        plan.make_plan(settings, PlanOptions(memory_gib=1.0))


@pytest.mark.slow  # builds the bundled duplex model
def test_duplex_data_has_bins_in_seconds(tmp_path, compiled):
    keys = run("s2s_duplex", tmp_path, "--buckets", "2", "--memory-gib", "0.05")
    assert (
        keys["max_duration"] == keys["bucket_duration_bins"][-1] > keys["bucket_duration_bins"][0]
    )
    assert "use_multimodal_sampling" not in keys and len(keys["bucket_batch_size"]) == 2
    settings = experiment.read_run("s2s_duplex", over=[tmp_path / "plan.yaml"])
    model = experiment.make_model(settings.values["model"], settings.near)
    data = experiment.make_data(settings.values["data"], model)
    data.setup(frame_count=model.frame_count)
    assert {bucket.shape for bucket in data.plan().buckets} <= set(compiled)
    assert (data.plan().bucket_of >= 0).all()
