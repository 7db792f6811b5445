"""What a run directory tells about its model: step, validation, evaluation and data sets."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax import checkpointing
from speechlm2_jax.pretrained import registry
from speechlm2_jax.settings import SettingsError, load, parse_json

CONFIG, METRICS, EVALUATION = "config.yaml", "metrics.jsonl", "answers.jsonl"
DATA_KEYS = (
    *("manifest_filepath", "cuts_path", "shar_path"),
    *("paths", "source_paths", "target_paths", "data_dir"),
)
VALIDATION = "val_"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about the weights that were read from a run."""

    step: int | None = None
    """The optimizer step whose weights they are."""
    validation: Mapping[str, float] | None = None
    """Metrics of the last validation up to that step."""
    data: tuple[str, ...] = ()
    """Names of the training manifests, without their folders."""
    test_set: str | None = None
    """Name of the test set of the run's own evaluation of this step."""
    wer: float | None = None
    """Its word error rate."""


def read_run_facts(path: Path | None) -> RunFacts:
    """Reads a run directory; nothing is known of another path."""
    if path is None or not registry.is_run(path):
        return RunFacts()
    chosen = checkpointing.intact_step(path)
    step = None if chosen is None else int(chosen.name)
    return RunFacts(
        step=step,
        validation=_validation(path / METRICS, step),
        data=_data(path / CONFIG),
        **_evaluation(path / EVALUATION, step),
    )


def _validation(file: Path, step: int | None) -> dict[str, float] | None:
    found = None
    for row in _rows(file):
        number = row.get("step")
        if not isinstance(number, int) or (step is not None and number > step):
            continue
        values = {k: v for k, v in row.items() if k.startswith(VALIDATION)}
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        found = numbers or found
    return found


def _evaluation(file: Path, step: int | None) -> dict[str, Any]:
    """The word error rate that evaluate.py wrote for these weights."""
    rows = list(_rows(file))
    block = rows[-1].get("provenance") if rows else None
    if not isinstance(block, Mapping) or (block.get("model") or {}).get("step") != step:
        return {}
    totals, inputs = block.get("totals") or {}, block.get("inputs")
    wer = totals.get("wer")
    if not isinstance(wer, int | float) or not isinstance(inputs, str):
        return {}
    return {} if totals.get("audio_is_swapped") else {"test_set": Path(inputs).name, "wer": wer}


def _data(config: Path) -> tuple[str, ...]:
    if not config.is_file():
        return ()
    try:
        settings = load(config, complete=False)
    except SettingsError:  # the weights are readable without it
        return ()
    block = (settings.get("data") or {}).get("train_ds") or {}
    return tuple(dict.fromkeys(Path(name).name for name in _names(block)))


def _names(block: Any) -> Iterator[str]:
    """Every manifest of a data block, at any depth."""
    if isinstance(block, Mapping):
        for key, value in block.items():
            if key in DATA_KEYS:
                yield from _strings(value)
            else:
                yield from _names(value)
    elif isinstance(block, list):
        for part in block:
            yield from _names(part)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; what is cut off or damaged is left out."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except (SettingsError, json.JSONDecodeError):
            continue
        if isinstance(row, dict):
            yield row
