"""train.py with augmentation and a recording that is missing: resumed, it does the same."""

import json

import numpy as np
import pytest
import soundfile
import yaml

from tests.training.test_train_process import Train, rows
from tests.training.tiny_salm import RATE_HZ

STEPS = 14
"""More than an epoch: three speeds of 8 conversations make 12 batches of 2."""


def lines(run_dir):
    text = (run_dir / "data_errors.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow  # three processes, each of which imports and compiles
def test_an_augmented_run_resumes_exactly_and_lists_what_it_could_not_read(tmp_path):
    train = Train(tmp_path)
    noise = np.random.default_rng(3).normal(0, 0.05, 3 * RATE_HZ)
    soundfile.write(tmp_path / "noise.wav", noise, RATE_HZ)
    row = {"audio_filepath": "noise.wav", "duration": 3.0}
    (tmp_path / "noise.jsonl").write_text(json.dumps(row) + "\n")
    settings = json.loads(json.dumps(yaml.safe_load(train.config.read_text())))  # no aliases
    settings["data"]["train_ds"] |= {
        "perturb_speed": True,
        "perturb_volume": True,
        "noise_path": str(tmp_path / "noise.jsonl"),
        "noise_snr": [0, 10],
        "rir_enabled": True,
        "max_error_rate": 0.9,
    }
    (same,) = settings["data"]["validation_ds"]["datasets"].values()
    written = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    good = [line for line in written if '"5.wav"' not in line]
    (tmp_path / "validation.jsonl").write_text("".join(good))
    same["input_cfg"][0]["manifest_filepath"] = str(tmp_path / "validation.jsonl")
    settings["trainer"] |= {"val_check_interval": 7, "limit_train_batches": 7}
    train.config.write_text(yaml.safe_dump(settings))
    (tmp_path / "5.wav").unlink()

    train.run(tmp_path / "whole", f"trainer.max_steps={STEPS}")
    train.run(tmp_path / "parts", "trainer.max_steps=7")
    train.run(tmp_path / "parts", f"trainer.max_steps={STEPS}")
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert [row["step"] for row in whole[0]] == list(range(1, STEPS + 1))
    assert parts[0] == whole[0] and lines(tmp_path / "parts") == lines(tmp_path / "whole")
    found = lines(tmp_path / "whole")
    assert {row["id"].partition("_")[0] for row in found} == {"5"}
    assert {row["cause"] for row in found} == {"missing"} and len(found) >= 3
    assert all(row["replaced_by"] for row in found)
    assert {row["set"] for row in found} == {"train_ds"}
    assert whole[0][-1]["dropped"] == len(found)
