"""train.py as a person uses it: started, interrupted, started again, started once more."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from speechlm2_jax.exit_codes import UNFINISHED
from tests.training.tiny_salm import write_config

ROOT = Path(__file__).parents[2]
LLM = ROOT / "tests" / "data" / "llm" / "llama"
STEPS = 150
INTERRUPTED_AT = 40
COMPARED = ("step", "loss", "learning_rate", "grad_norm", "acc", "skipped", "dropped")


class Train:
    """train.py in processes that share compiled programs."""

    def __init__(self, folder):
        self.config = write_config(
            folder,
            trainer={
                "max_steps": STEPS,
                "limit_train_batches": 50,
                "log_every_n_steps": 1,
                "precision": "32-true",
            },
        )
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        self.environment = {**os.environ, **cache, "JAX_PLATFORMS": "cpu"}

    def start(self, run_dir, *overrides):
        words = ["--config", str(self.config), f"exp_manager.explicit_log_dir={run_dir}"]
        return subprocess.Popen(
            [sys.executable, "train.py", *words, *overrides],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, run_dir, *overrides):
        process = self.start(run_dir, *overrides)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return out


def rows(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    training = [{k: row[k] for k in COMPARED} for row in lines if "loss" in row]
    return training, [row for row in lines if "val_loss" in row]


@pytest.mark.slow  # five processes, each of which imports and compiles
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, number):
    train = Train(tmp_path)
    out = train.run(tmp_path / "whole")
    assert out.splitlines()[0] == f"speechlm2_jax: reading {train.config} ..."
    assert "hypothesis:" in out and f"finished {STEPS} steps" in out

    process = train.start(tmp_path / "parts")
    for line in process.stdout:
        if line.startswith(f"step {INTERRUPTED_AT}/"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=600)
    assert process.returncode == UNFINISHED, err
    assert not (tmp_path / "parts" / "FINISHED").exists()
    assert f"next: python train.py --config {train.config}" in out
    stopped_at = len(rows(tmp_path / "parts")[0])
    assert INTERRUPTED_AT <= stopped_at < STEPS
    assert f"resuming from {tmp_path / 'parts' / 'checkpoints' / str(stopped_at)}" in train.run(
        tmp_path / "parts"
    )
    assert json.loads((tmp_path / "parts" / "FINISHED").read_text())["step"] == STEPS
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")[0]) == STEPS


@pytest.mark.slow  # two processes, each of which imports
def test_a_finished_run_ends_at_once_without_weights_or_computation(tmp_path):
    train = Train(tmp_path)
    llm = shutil.copytree(LLM, tmp_path / "llm")
    words = ("trainer.max_steps=2", f"model.pretrained_llm={llm}")
    train.run(tmp_path / "run", *words)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(llm)
    out = train.run(tmp_path / "run", *words)
    assert "this run is finished: 2 steps are done" in out
    assert "next: python evaluate.py" in out and "trainer.max_steps=4  to train longer" in out
    assert "trainer.max_steps=2" not in out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "compil" not in out
