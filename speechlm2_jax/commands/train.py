"""`speechlm2-jax train` and train.py: trains a speech language model from a YAML file.

Values of a second `--config` replace those of the first: --config salm --config plan.yaml.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from speechlm2_jax import console, launch
from speechlm2_jax.settings import SettingsError, find, parse_train
from speechlm2_jax.training.run import huge_pages
from speechlm2_jax.usage import HELP

if TYPE_CHECKING:
    from speechlm2_jax.aot.report import Report

PROGRAM = "train.py"


def run(argv: Sequence[str], *, program: str = PROGRAM) -> None:
    """Trains; the process starts itself once more with huge memory pages if that helps."""
    if not set(HELP) & set(argv):
        huge_pages.restart_with_huge_pages()
    console.ignore_closed_pipes()
    main(argv, program=program)


def main(argv: Sequence[str], *, program: str = PROGRAM) -> None:
    """Parses arguments, builds the experiment and trains. Bad input: one line, exit code 2.

    A run that was stopped before its end exits with 75, so that a script can start it again.
    """
    code = 0
    with (
        console.one_line_errors(program, [SettingsError]),
        console.showing(is_shown=launch.is_first_process()),
    ):
        command = parse_train(argv, program)
        console.log_line(f"speechlm2_jax: reading {find(command.config)} ...")
        with console.phase("importing"):
            from speechlm2_jax import experiment, processes
            from speechlm2_jax.training.run import finishing, goodput

        importing_s, ahead = goodput.process_age_s(), command.ahead
        with processes.exit_on_error(), experiment.clear_errors(program):
            run = experiment.read_run(
                command.config,
                command.overrides,
                over=command.over,
                model_alone=ahead is not None,
            )
            if ahead is not None:
                sys.exit(_compile_ahead(run.compile_ahead(ahead)))
            run.initialize_processes()
            if command.dry_run:
                run.build(dry_run=True).dry_run()
            elif not run.is_finished():
                run.count_from_process_start(importing_s)
                code = finishing.exit_code(run.build(keep_compiled=True).fit())
    if code:  # out of `exit_on_error`, so that processes wait for each other
        sys.exit(code)


def _compile_ahead(report: "Report") -> int:
    """Prints the cost estimate as a table and as JSON. Returns 1 if it does not fit."""
    print(report.table())
    print(report.to_json())
    return 0 if report.fits else 1
