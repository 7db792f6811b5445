"""`speechlm2-jax runs`: compares runs in a table, and in one HTML page of curves.

    speechlm2-jax runs
    speechlm2-jax runs runs/salm runs/salm2 --html runs.html
    speechlm2-jax runs gs://my-bucket/runs

Each argument is a run directory, a folder that holds some, or such an address of an object store;
by default it is `runs`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax import console
from speechlm2_jax.settings import SettingsError

PROGRAM = "speechlm2-jax runs"


def main(argv: Sequence[str], *, program: str = PROGRAM) -> None:
    """Prints the table, and writes the page. Bad input: one line, exit code 2."""
    with console.one_line_errors(program, [SettingsError]):
        parser = argparse.ArgumentParser(
            prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("places", nargs="*", default=["runs"], metavar="RUN")
        parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page of curves")
        options = parser.parse_args(argv)
        from speechlm2_jax.inspection.runs import (
            CONFIG,
            METRICS,
            MOST_COLUMNS,
            find_runs,
            table,
            validation_metrics,
        )

        if options.html is not None and options.html.is_dir():
            raise SettingsError(f"--html: {options.html} is a folder; name a file")
        runs = find_runs([folder for place in options.places for folder in _folders(place)])
        rows = table(runs, MOST_COLUMNS)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            first = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
            others = "".join(
                f"  {cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)
            )
            print(first + others)
        if left_out := validation_metrics(runs)[MOST_COLUMNS:]:
            print(f"not in this table: {', '.join(left_out)}  (--html FILE shows all)")
        for run in runs:
            if run.config_problem is not None:
                print(f"{run.path / CONFIG}: cannot be read ({run.config_problem})")
            if run.damaged:
                print(f"{run.path / METRICS}: {run.damaged} damaged lines are left out")
        if options.html is not None:
            from speechlm2_jax.inspection.runs_page import write_runs_page

            write_runs_page(options.html, runs)
            print(f"page: {options.html}  (open it in a browser)")


def _folders(place: str) -> list[Path]:
    """The folders of a place; of an address those of its runs, with their metrics downloaded."""
    from speechlm2_jax.object_store.copies import fetch_metrics
    from speechlm2_jax.object_store.folders import is_address, local_path

    return fetch_metrics(place) if is_address(place) else [local_path(place)]
