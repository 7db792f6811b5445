"""A run over an index trains, stops inside a window and resumes with the same losses."""

import json

import pytest

from speechlm2_jax import experiment
from speechlm2_jax.data.index import row_count
from tests.training.tiny_salm import write_config

STEPS, STOP = 6, 3


def losses(folder):
    rows = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow  # trains twice
def test_a_run_over_an_index_resumes_with_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(row_count, "LARGE_ROWS", 4)
    monkeypatch.setattr("speechlm2_jax.data.prepare.WINDOW_ROWS", 5)
    trainer = {
        "max_steps": STEPS,
        "precision": "32-true",
        "limit_train_batches": STEPS,
        "val_check_interval": STOP,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "compilation_cache_dir": str(tmp_path / "compiled"),
    }
    found = []
    for name, stops in (("whole", (STEPS,)), ("stopped", (STOP, STEPS))):
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(folder, trainer=trainer)
        for steps in stops:
            experiment.build(config, [f"trainer.max_steps={steps}"]).fit()
        assert (folder / "train.jsonl.index" / "rows" / "meta.json").is_file()
        found.append(losses(folder))
    assert found[0] == found[1] and list(found[0]) == list(range(1, STEPS + 1))
