"""`evaluate.py --compare A B`: do two evaluations of the same recordings differ, or is it luck?"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.evaluation.config import CHANGE_NO_RESPONSE
from speechlm2_jax.evaluation.metrics.resampling import compare
from speechlm2_jax.evaluation.metrics.task_metrics import (
    PERPLEXITY,
    TASK_METRICS,
    Pair,
    check_metrics,
)
from speechlm2_jax.evaluation.metrics.wer import check_normalizer
from speechlm2_jax.settings import SettingsError

RESPONSES = "answers.jsonl"
COMPARE = "--compare"
PROVENANCE, NORMALIZER = "provenance", "use_normalizer"


def compare_responses(argv: Sequence[str], program: str) -> str:
    """A table of each metric of both, the change, its 95 % interval and p-value.

    Raises SettingsError for files that are not there or have other references.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument(
        COMPARE, nargs=2, type=Path, required=True, metavar="RESPONSES", help="files or run folders"
    )
    parser.add_argument("--metrics", default="wer", help="names with commas: wer,cer,intent")
    parser.add_argument("--use-normalizer", help="as use_normalizer=; that of both evaluations")
    options = parser.parse_args(argv)
    names = [name.strip() for name in options.metrics.split(",")]
    try:
        check_metrics(names)
        if options.use_normalizer is not None:
            check_normalizer(options.use_normalizer)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    files = [path / RESPONSES if path.is_dir() else path for path in options.compare]
    first, second = (_read(file) for file in files)
    common = [key for key in first if key in second]
    _check(options.compare, first, second, common)
    if PERPLEXITY in names:
        _check_tokens(options.compare, first, second, common)
    records = [_provenance(file) for file in files]
    normalizer = options.use_normalizer or _normalizer(records)
    lines = [f"{len(common)} responses; second minus first, paired bootstrap"]
    lines += _differences(records)
    for name in names:
        metric = TASK_METRICS[name]
        pairs = [[responses[key] for key in common] for responses in (first, second)]
        found = compare(metric, pairs[0], pairs[1], normalizer)
        lines += [
            f"{metric.title}",
            f"  first   {found.first}",
            f"  second  {found.second}",
            f"  change  {found.change}"
            + ("" if found.p_value is None else f", p = {found.p_value:.3f}")
            + (f"  ({_verdict(found.p_value, found.change.value, metric.more_is_better)})"),
        ]
    return "\n".join(lines)


def _verdict(p_value: float | None, change: float | None, more_is_better: bool) -> str:
    if p_value is None or change is None:
        return "nothing to compare: no reference has words"
    if p_value > 0.05:
        return "no difference that is larger than chance"
    return f"the second is {'better' if (change > 0) == more_is_better else 'worse'}"


def _provenance(file: Path) -> Mapping[str, Any]:
    """How an output manifest was made; empty if it does not tell."""
    return next((row[PROVENANCE] for _, row in json_lines(file) if row.get(PROVENANCE)), {})


def _normalizer(records: Sequence[Mapping[str, Any]]) -> str:
    """The normaliser of both evaluations; `english` if they do not tell.

    Raises SettingsError if they differ.
    """
    used = [record["settings"].get(NORMALIZER) for record in records if "settings" in record]
    names = list(dict.fromkeys("english" if u is True else str(u or "none").lower() for u in used))
    if len(names) > 1:
        raise SettingsError(
            f"{COMPARE}: the first was scored with {NORMALIZER}={names[0]}, the second with "
            f"{names[1]}; choose one with --use-normalizer"
        )
    return names[0] if names else "english"


def _differences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines about the settings and models that differ, as far as both tell."""
    if not all("settings" in record for record in records):
        return ["  settings  not compared: a file has no provenance"]
    first, second = (record["settings"] for record in records)
    found = {
        key: (first.get(key), second.get(key))
        for key in {**first, **second}
        if key not in CHANGE_NO_RESPONSE
    }
    models = [_model(record) for record in records]
    found = {"model": (models[0], models[1]), **found}
    return [f"  {key}  {one}, then {other}" for key, (one, other) in found.items() if one != other]


def _model(record: Mapping[str, Any]) -> str:
    """Name and step of the model; its hash tells apart what is saved under one name."""
    model = record.get("model") or {}
    step = "" if "step" not in model else f", step {model['step']}"
    return f"{model.get('name')}{step} ({str(model.get('sha256'))[:8]})"


def _read(file: Path) -> dict[str, Pair]:
    """Id -> reference and response of an output manifest."""
    if not file.is_file():
        raise SettingsError(f"{COMPARE}: {file} is not there; evaluate.py writes it")
    found: dict[str, Pair] = {}
    for where, row in json_lines(file):
        if PROVENANCE in row or "error" in row:
            continue
        text, response = row.get("text_raw", row.get("text")), row.get("pred_text_raw")
        response = row.get("pred_text") if response is None else response
        if "id" not in row or response is None:
            raise SettingsError(f"{where}: not a row of evaluate.py's output manifest")
        if text is not None:
            key = str(row["id"])
            if key in found:
                raise SettingsError(f"{where}: the id {key!r} occurs twice")
            found[key] = Pair(text, response, row.get("nll") or 0.0, row.get("tokens") or 0)
    return found


def _check(
    paths: Sequence[Path], first: dict[str, Pair], second: dict[str, Pair], common: list[str]
) -> None:
    """Raises SettingsError unless both have the same references."""
    if not common:
        raise SettingsError(f"{COMPARE}: {paths[0]} and {paths[1]} have no response in common")
    if len(common) < max(len(first), len(second)):
        raise SettingsError(
            f"{COMPARE}: {len(first)} and {len(second)} responses with a reference, but only "
            f"{len(common)} in common; evaluate both on the same inputs"
        )
    if differing := [key for key in common if first[key][0] != second[key][0]]:
        raise SettingsError(f"{COMPARE}: the references of {differing[0]!r} differ")


def _check_tokens(
    paths: Sequence[Path], first: dict[str, Pair], second: dict[str, Pair], common: list[str]
) -> None:
    """Raises SettingsError unless the losses of both are of the same tokens."""
    for path, responses in zip(paths, (first, second), strict=True):
        if not any(pair.tokens for pair in responses.values()):
            raise SettingsError(
                f"{COMPARE}: {path} has no nll; evaluate it with metrics=[{PERPLEXITY}]"
            )
    if differing := [key for key in common if first[key].tokens != second[key].tokens]:
        raise SettingsError(
            f"{COMPARE}: the reference of {differing[0]!r} has {first[differing[0]].tokens} tokens "
            f"in one and {second[differing[0]].tokens} in the other; perplexities are comparable "
            "only with one tokenizer and prompt format"
        )
