"""`evaluate.py --compare A B`: do two evaluations of the same recordings differ, or is it luck?

Of three or more (seeds of one training), the mean and the spread.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.data.manifest_values import located, mapping, shown
from speechlm2_jax.evaluation.config import CHANGE_NO_RESPONSE
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.metrics.resampling import compare, estimate
from speechlm2_jax.evaluation.metrics.task_metrics import (
    PERPLEXITY,
    TASK_METRICS,
    Pair,
    check_metrics,
)
from speechlm2_jax.evaluation.metrics.wer import check_normalizer
from speechlm2_jax.evaluation.seeds import spread
from speechlm2_jax.settings import SettingsError

RESPONSES = "answers.jsonl"
_FILES = "two or more files or run folders"
COMPARE = "--compare"
PROVENANCE, NORMALIZER = "provenance", "use_normalizer"


def compare_responses(argv: Sequence[str], program: str) -> str:
    """A table of each metric of both, the change, its 95 % interval and p-value.

    Of three or more evaluations: each metric of all, mean and standard deviation.
    Raises SettingsError for files that are not there or have other references.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument(
        COMPARE, nargs="+", type=Path, required=True, metavar="RESPONSES", help=_FILES
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
    if len(options.compare) < 2:
        raise SettingsError(f"{COMPARE}: takes two or more evaluations, got one")
    files = [manifest_of(path) for path in options.compare]
    first, *others = each = [read_responses(file) for file in files]
    for path, other in zip(options.compare[1:], others, strict=True):
        check_references((options.compare[0], path), first, other)
        if PERPLEXITY in names:
            _check_tokens((options.compare[0], path), first, other, list(first))
    records = [_provenance(file) for file in files]
    normalizer = options.use_normalizer or _normalizer(records)
    pairs = [[responses[key] for key in first] for responses in each]
    if others[1:]:
        lines = [f"{len(each)} evaluations of {len(first)} responses: mean and spread"]
        lines += _differences(records)
        return "\n".join(lines + _spread_lines(options.compare, pairs, names, normalizer))
    lines = [f"{len(first)} responses; second minus first, paired bootstrap"]
    lines += _differences(records)
    return "\n".join(lines + _change_lines(pairs, names, normalizer))


def _spread_lines(
    paths: Sequence[Path],
    pairs: Sequence[Sequence[Pair]],
    names: Sequence[str],
    normalizer: str | bool | None,
) -> list[str]:
    """Each metric of each evaluation, and mean, standard deviation and range of all."""
    lines, width = [], max(len(str(path)) for path in paths)
    for metric in (TASK_METRICS[name] for name in names):
        found = [estimate(metric, one, normalizer) for one in pairs]
        lines.append(metric.title)
        lines += [f"  {path!s:<{width}}  {one}" for path, one in zip(paths, found, strict=True)]
        values = [one.value for one in found if one.value is not None]
        both = spread([one.value for one in found])
        if both["mean"] is None:
            lines.append(f"  {'mean':<{width}}  n/a")
            continue
        lines.append(
            f"  {'mean':<{width}}  {both['mean']:.2f}, standard deviation {both['deviation']:.2f}, "
            f"from {min(values):.2f} to {max(values):.2f}"
        )
    return lines


def _change_lines(
    pairs: Sequence[Sequence[Pair]], names: Sequence[str], normalizer: str | bool | None
) -> list[str]:
    """Each metric of both evaluations, and the change."""
    lines = []
    for metric in (TASK_METRICS[name] for name in names):
        found = compare(metric, pairs[0], pairs[1], normalizer)
        lines += [
            f"{metric.title}",
            f"  first   {found.first}",
            f"  second  {found.second}",
            f"  change  {found.change}"
            + ("" if found.p_value is None else f", p = {found.p_value:.3f}")
            + (f"  ({_verdict(found.p_value, found.change.value, metric.more_is_better)})"),
        ]
    return lines


def manifest_of(path: Path) -> Path:
    """The output manifest of a run folder, or the file itself."""
    return path / RESPONSES if path.is_dir() else path


def _verdict(p_value: float | None, change: float | None, more_is_better: bool) -> str:
    if p_value is None or change is None:
        return "nothing to compare: no reference has words"
    if p_value > 0.05:
        return "no difference that is larger than chance"
    return f"the second is {'better' if (change > 0) == more_is_better else 'worse'}"


def _provenance(file: Path) -> Mapping[str, Any]:
    """How an output manifest was made; empty if it does not tell."""
    found = ((where, row[PROVENANCE]) for where, row in json_lines(file) if row.get(PROVENANCE))
    where, record = next(found, ("", {}))
    with located(where):
        for key in ("settings", "model"):
            mapping(mapping(record, PROVENANCE).get(key), f"{PROVENANCE}.{key}")
    return record


def _normalizer(records: Sequence[Mapping[str, Any]]) -> str:
    """The normaliser of both evaluations; `english` if they do not tell.

    Raises SettingsError if they differ.
    """
    used = [own.get(NORMALIZER) for record in records if (own := record.get("settings"))]
    names = list(dict.fromkeys("english" if u is True else str(u or "none").lower() for u in used))
    if len(names) > 1:
        raise SettingsError(
            f"{COMPARE}: the first was scored with {NORMALIZER}={names[0]}, the second with "
            f"{names[1]}; choose one with --use-normalizer"
        )
    return names[0] if names else "english"


def _differences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines about the settings and models that differ, as far as both tell."""
    if not all(record.get("settings") for record in records):
        return ["  settings  not compared: a file has no provenance"]
    settings = [record["settings"] for record in records]
    keys = dict.fromkeys(key for one in settings for key in one if key not in CHANGE_NO_RESPONSE)
    found = {"model": [_model(record) for record in records]}
    found |= {key: [one.get(key) for one in settings] for key in keys}
    return [
        f"  {key}  {', then '.join(map(str, values))}"
        for key, values in found.items()
        if any(value != values[0] for value in values)
    ]


def _model(record: Mapping[str, Any]) -> str:
    """Name and step of the model; its hash tells apart what is saved under one name."""
    model = record.get("model") or {}
    step = "" if "step" not in model else f", step {model['step']}"
    return f"{model.get('name')}{step} ({str(model.get('sha256'))[:8]})"


def read_responses(file: Path, key: str = COMPARE) -> dict[str, Pair]:
    """Id -> reference and response of an output manifest. Raises SettingsError, naming `key`."""
    if not file.is_file():
        raise SettingsError(f"{key}: {file} is not there; evaluate.py writes it")
    found: dict[str, Pair] = {}
    for where, row in json_lines(file):
        if PROVENANCE in row or "error" in row:
            continue
        text, response = row.get("text_raw", row.get("text")), row.get("pred_text_raw")
        response = row.get("pred_text") if response is None else response
        if "id" not in row or response is None:
            raise SettingsError(f"{where}: not a row of evaluate.py's output manifest")
        if text is not None:
            name = str(row["id"])
            if name in found:
                raise SettingsError(f"{where}: the id {name!r} occurs twice")
            found[name] = _pair(where, text, response, row)
    return found


def _pair(where: str, text: object, response: object, row: Mapping[str, Any]) -> Pair:
    """A reference with its response. Raises SettingsError for values of other types."""
    with located(where):
        for key, value in (("text_raw", text), ("pred_text_raw", response)):
            if not isinstance(value, str):
                raise SettingsError(f"{key} must be text, got {shown(value)}")
        nll, tokens = row.get("nll") or 0.0, row.get("tokens") or 0
        if not isinstance(nll, int | float) or not math.isfinite(nll):
            raise SettingsError(f"nll must be a number, got {shown(nll)}")
        if not isinstance(tokens, int) or tokens < 0:
            raise SettingsError(f"tokens must be a count, got {shown(tokens)}")
    assert isinstance(text, str) and isinstance(response, str)
    return Pair(text, response, nll, tokens)


def other_seeds(
    names: Sequence[str], utterances: Sequence[Utterance]
) -> dict[str, dict[str, Pair]]:
    """The responses of evaluations with other seeds, to the same utterances, by their names.

    Raises SettingsError for files that are not there or have other references.
    """
    own = {u.id: Pair(u.text, "") for u in utterances if u.text is not None}
    found = {}
    for name in names:
        found[name] = read_responses(manifest_of(Path(name)), "seeds")
        check_references(("the inputs", name), own, found[name], "seeds")
    return found


def check_references(
    paths: Sequence[Path | str],
    first: Mapping[str, Pair],
    second: Mapping[str, Pair],
    name: str = COMPARE,
) -> None:
    """Raises SettingsError, naming `name`, unless both have the same references."""
    common = [key for key in first if key in second]
    if not common:
        raise SettingsError(f"{name}: {paths[0]} and {paths[1]} have no response in common")
    if len(common) < max(len(first), len(second)):
        raise SettingsError(
            f"{name}: {len(first)} and {len(second)} responses with a reference, but only "
            f"{len(common)} in common; evaluate both on the same inputs"
        )
    if differing := [key for key in common if first[key][0] != second[key][0]]:
        raise SettingsError(f"{name}: the references of {differing[0]!r} differ")


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
