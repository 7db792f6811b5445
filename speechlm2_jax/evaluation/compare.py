"""`evaluate.py --compare A B`: do two evaluations of the same recordings differ, or is it luck?"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.evaluation.metrics.resampling import compare
from speechlm2_jax.evaluation.metrics.task_metrics import TASK_METRICS, Pair, check_metrics
from speechlm2_jax.evaluation.metrics.wer import check_normalizer
from speechlm2_jax.settings import SettingsError

RESPONSES = "answers.jsonl"
COMPARE = "--compare"


def compare_responses(argv: Sequence[str], program: str) -> str:
    """A table of each metric of both, the change, its 95 % interval and p-value.

    Raises SettingsError for files that are not there or have other references.
    """
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument(
        COMPARE, nargs=2, type=Path, required=True, metavar="RESPONSES", help="files or run folders"
    )
    parser.add_argument("--metrics", default="wer", help="names with commas: wer,cer,intent")
    parser.add_argument("--use-normalizer", default="english", help="as use_normalizer=")
    options = parser.parse_args(argv)
    names = [name.strip() for name in options.metrics.split(",")]
    try:
        check_metrics(names)
        check_normalizer(options.use_normalizer)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    first, second = (_read(path) for path in options.compare)
    common = [key for key in first if key in second]
    _check(options.compare, first, second, common)
    lines = [f"{len(common)} responses; second minus first, paired bootstrap"]
    for name in names:
        metric = TASK_METRICS[name]
        pairs = [[responses[key] for key in common] for responses in (first, second)]
        found = compare(metric, pairs[0], pairs[1], options.use_normalizer)
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


def _read(path: Path) -> dict[str, Pair]:
    """Id -> reference and response of an output manifest, or of a run directory's."""
    file = path / RESPONSES if path.is_dir() else path
    if not file.is_file():
        raise SettingsError(f"{COMPARE}: {file} is not there; evaluate.py writes it")
    found: dict[str, Pair] = {}
    for where, row in json_lines(file):
        if "provenance" in row or "error" in row:
            continue
        text, response = row.get("text_raw", row.get("text")), row.get("pred_text_raw")
        response = row.get("pred_text") if response is None else response
        if "id" not in row or response is None:
            raise SettingsError(f"{where}: not a row of evaluate.py's output manifest")
        if text is not None:
            key = str(row["id"])
            if key in found:
                raise SettingsError(f"{where}: the id {key!r} occurs twice")
            found[key] = (text, response)
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
