"""train.py with packed rows: resumed, it does the same, with less padding than without."""

import json

import numpy as np
import pytest

from tests.training.test_train_process import Train, rows

ROWS = "data.train_ds.batch_size=1"
"""A row holds all 8 conversations, so each step is an epoch."""
PACKED = ("+data.train_ds.packed=true", "+data.train_ds.packed_tokens=320", ROWS)
STEPS = 6


def paddings(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["padding"] for line in lines if "loss" in line]


@pytest.mark.slow  # four processes, each of which imports and compiles
def test_a_packed_run_resumes_exactly_and_has_less_padding(tmp_path):
    train = Train(tmp_path)
    train.run(tmp_path / "plain", "trainer.max_steps=4")
    train.run(tmp_path / "whole", f"trainer.max_steps={STEPS}", *PACKED)
    train.run(tmp_path / "parts", "trainer.max_steps=2", *PACKED)
    train.run(tmp_path / "parts", f"trainer.max_steps={STEPS}", *PACKED)
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert [row["step"] for row in whole[0]] == list(range(1, STEPS + 1))
    assert parts[0] == whole[0]
    of_an_epoch = [np.mean(paddings(tmp_path / name)) for name in ("whole", "plain")]
    assert of_an_epoch[0] < 0.03 < of_an_epoch[1]
