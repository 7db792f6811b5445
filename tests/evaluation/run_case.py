"""Run directories without weights: all that finding and describing them needs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import evaluate


def evaluate_on_one_device(argv: Sequence[str]) -> int:
    """evaluate.py on one of the eight devices of the tests, as on a laptop."""
    return evaluate.main([*argv, "devices=1"])


SETTINGS: dict[str, Any] = {
    "model": {"pretrained_llm": "parts/tiny_llm", "pretrained_asr": "parts/encoder.nemo"},
    "trainer": {"precision": "32-true"},
    "data": {
        "train_ds": {
            "input_cfg": [
                {
                    "type": "group",
                    "input_cfg": [
                        {
                            "type": "lhotse_as_conversation",
                            "manifest_filepath": "train.jsonl",
                            "tags": {"context": "Write down:", "system_prompt": "Be exact."},
                        }
                    ],
                }
            ]
        }
    },
}


def make_run(
    folder: Path,
    *,
    saved_at_s: float = 1e9,
    steps: tuple[int, ...] = (10, 20),
    best: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Makes a run whose last checkpoint is of a time; `best` is the step of the lowest val_wer."""
    folder.mkdir(parents=True)
    for number, step in enumerate(steps):
        path = folder / "checkpoints" / str(step)
        path.mkdir(parents=True)
        (path / "_CHECKPOINT_METADATA").write_text("{}")  # as an older version left it
        time_s = saved_at_s - len(steps) + 1 + number
        os.utime(path, (time_s, time_s))
    if best is not None:
        metrics = {step: {"val_wer": 0.1 if step == best else 0.2} for step in steps}
        text = json.dumps({"monitor": "val_wer", "mode": "min", "metrics": metrics})
        (folder / "checkpoints" / "ranking.json").write_text(text)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS if settings is None else settings))
    return folder


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a NeMo manifest; audio and duration are made up where a row has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    full = [{"audio_filepath": f"{n}.wav", "duration": 1.0, **row} for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in full))
    return path
