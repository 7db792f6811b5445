"""train.py with packed rows: resumed, it does the same, with less padding than without."""

import json

import pytest

from tests.training.test_train_process import Train, rows

PACKED = ("+data.train_ds.packed=true", "+data.train_ds.packed_tokens=192")
STEPS = 6
"""More than an epoch of 8 conversations."""


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
    assert min(paddings(tmp_path / "whole")) < min(paddings(tmp_path / "plain"))
