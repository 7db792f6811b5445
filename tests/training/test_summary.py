"""A dry run: counts that are the model's own, shapes, steps and memory, and nothing written."""

import math

import numpy as np
import pytest

import train
from speechlm2_jax import experiment
from speechlm2_jax.training.run.summary import ModuleSize, module_sizes
from tests.training.tiny_salm import LLAMA, write_config
from tests.training.toy import LAYERS, VOCAB, WIDTH, ToyData, ToyModel, make_trainer


@pytest.fixture
def config(tmp_path):
    """A tiny SALM with LoRA in a frozen LLM, whose weights are not there."""
    llm = tmp_path / "llm"
    llm.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (llm / name).write_bytes((LLAMA / name).read_bytes())
    return write_config(tmp_path, llm=llm, trainer={"max_steps": 4, "limit_train_batches": 3})


def test_a_dry_run_describes_a_model_without_its_weights_and_writes_nothing(
    config, tmp_path, capsys
):
    train.main(["--config", str(config), "--dry-run"])
    out, err = capsys.readouterr()
    assert "note: " in err and "has no weights" in err
    model = experiment.build(config, dry_run=True).model
    parameters = {path: i for path, i in model.infos.items() if not i.is_buffer}
    counts = [
        sum(
            math.prod(info.shape)
            for path, info in parameters.items()
            if np.any(model.trainable[path]) == is_trained
        )
        for is_trained in (True, False)
    ]
    total = next(line for line in out.splitlines() if line.startswith("total "))
    assert total.split() == ["total", *(f"{n:,}" for n in (*counts, sum(counts)))]
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert {"perception.encoder", "perception.projection", "llm.layers (LoRA)"} <= set(rows)
    assert "an epoch (trainer.limit_train_batches): 3 batches, 3 steps" in out
    assert "bucket  longest  rows" in out and "filled" in out
    assert "optimizer state" in out and "activations" in out and "MiB" in out
    assert not (tmp_path / "run").exists()


def test_settings_are_read_once_and_the_trainer_is_built_once(config, monkeypatch):
    calls = []
    for name in ("load", "Trainer"):
        real = getattr(experiment, name)

        def counted(*given, name=name, real=real, **options):
            calls.append(name)
            return real(*given, **options)

        monkeypatch.setattr(experiment, name, counted)
    run = experiment.read_run(config)
    assert not run.is_finished()
    run.build(dry_run=True)
    assert calls == ["load", "Trainer"]


def test_modules_count_every_parameter_once_and_layers_by_what_trains_them():
    model = ToyModel()
    half = np.arange(LAYERS) < LAYERS // 2
    model.trainable = {**model.trainable, "layers.weight": half}
    sizes = module_sizes(model.infos, model.trainable)
    embedding = VOCAB * WIDTH
    weights, biases = LAYERS * WIDTH * WIDTH, LAYERS * WIDTH
    assert sizes == [
        ModuleSize(name="embedding", trained=0, frozen=embedding),
        ModuleSize(name="layers", trained=weights // 2 + biases, frozen=weights // 2),
        ModuleSize(name="head", trained=embedding, frozen=0),
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_dry_runs_memory_is_of_the_largest_shape_and_per_device(capsys, accumulate):
    options = {"accumulate_grad_batches": accumulate, "strategy": "fsdp", "devices": 4}
    trainer = make_trainer(max_steps=7, **options)
    trainer.dry_run(ToyModel(), ToyData(lengths=(5, 64)))
    out = capsys.readouterr().out
    assert "each of 4 x cpu, at a step of bucket T64" in out
    assert f"3 batches, {3 if accumulate == 1 else 2} steps" in out
    size = {line.rpartition("  ")[0].strip(): line.split()[-2] for line in out.splitlines()[-8:]}
    assert set(size) >= {"trained parameters", "gradients", "optimizer state", "batch", "total"}


def test_help_names_the_dry_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    assert "--dry-run" in capsys.readouterr().out
