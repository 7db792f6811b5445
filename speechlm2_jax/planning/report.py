"""A plan as a table on the terminal and as a YAML file with NeMo's keys."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from speechlm2_jax.aot.chips import GIB
from speechlm2_jax.evaluation.results import write_whole
from speechlm2_jax.planning.plan import Plan, PlannedBin, format_bin
from speechlm2_jax.settings import SettingsCommand


def table(plan: Plan) -> str:
    """A line per bin, and the figures of all."""
    rows = [_row(one) for one in plan.bins]
    widths = {name: max(len(row[name]) for row in [*rows, {name: name}]) for name in rows[0]}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    text = ["  ".join(row[name].rjust(widths[name]) for name in widths) for row in lines]
    return "\n".join([*text, *figures(plan)])


def figures(plan: Plan) -> list[str]:
    """What holds for all bins: padding, speed, memory, compilations."""
    found = plan.padding
    audio = "" if found.audio is None else f", {found.audio:.1%} of the audio"
    lines = [f"padding of {found.batches:,} batches: {found.positions:.1%} of LLM positions{audio}"]
    if plan.examples_per_s is not None:
        lines.append(f"speed: {plan.examples_per_s:.4g} examples/s, measured on {plan.devices}")
    share = plan.limit_bytes / plan.memory_bytes
    lines.append(
        f"memory: a program may need {_gib(plan.limit_bytes)} GiB, {share:.0%} of "
        f"{_gib(plan.memory_bytes)} GiB, on each of {plan.devices}"
    )
    lines.append(
        f"compiled {plan.compilations} programs for {len(plan.bins)} bins "
        f"in {plan.compiled_in_s:.0f} s"
    )
    return lines


def write_yaml(path: Path, plan: Plan, command: Sequence[str]) -> None:
    """Writes `data.train_ds` with NeMo's keys, to be merged over the configuration."""
    comment = [f"# {shlex.join(command)}", *(f"# {line}" for line in table(plan).splitlines())]
    keys: dict[str, Any] = dict(plan.keys)
    text = yaml.safe_dump({"data": {"train_ds": keys}}, sort_keys=False, default_flow_style=None)
    write_whole(path, "\n".join([*comment, text]))


def training_command(train: Sequence[str], command: SettingsCommand, path: Path, plan: Plan) -> str:
    """The command that trains with the plan: without the overrides that would replace it.

    `train` are the words that start a training.
    """
    planned = {f"data.train_ds.{key}" for key in plan.keys}
    kept = [one for one in command.overrides if one.partition("=")[0].lstrip("+~") not in planned]
    files = (command.config, *command.over, str(path))
    named = [word for file in files for word in ("--config", file)]
    return shlex.join([*train, *named, *kept])


def _row(one: PlannedBin) -> dict[str, str]:
    row = {
        "up to": format_bin(one.longest),
        "rows": f"{one.rows}",
        "GiB": _gib(one.memory_bytes),
        "padding": f"{one.padding:.1%}",
        "of the data": f"{one.share:.1%}",
        "examples/step": f"{one.examples:,}",
    }
    if one.seconds is not None:
        row |= {
            "s/step": f"{one.seconds:.3g}",
            "examples/s": f"{one.examples / one.seconds:.4g}",
        }
    else:
        row |= {"s/step": "-", "examples/s": "-"}
    return row


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
