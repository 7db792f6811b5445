"""Shows the data of a configuration as one HTML page, before anything is trained.

    python -m speechlm2_jax.data.inspect salm
    python -m speechlm2_jax.data.inspect my.yaml --output data.html --count 100 key=value ...

The page has durations, tokens, buckets and padding of every data set, and conversations with the
loss mask in colour and a player. The configuration, several `--config FILE` and `key=value` are
those of train.py; weights are not read.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax import console
from speechlm2_jax.settings import (
    SettingsCommand,
    SettingsError,
    parse_settings,
    settings_parser,
)

PROGRAM = "inspect"
MODULE = "python -m speechlm2_jax.data.inspect"


def main(argv: Sequence[str], *, program: str = PROGRAM) -> None:
    """Writes the page and prints its path. Bad input: one line, exit code 2; Ctrl-C: 130."""
    with console.one_line_errors(program, [SettingsError], kept=console.INDEX_KEPT):
        typed = MODULE if program == PROGRAM else program
        parser = settings_parser(typed, (__doc__ or "").replace(MODULE, typed))
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("--output", type=Path, default=Path("data.html"), help="the page")
        parser.add_argument("--count", type=int, default=40, help="conversations of each data set")
        arguments, command = parse_settings(parser, argv)
        _write(command, arguments.output, arguments.count, program)


def _write(command: SettingsCommand, output: Path, count: int, program: str) -> None:
    from speechlm2_jax import experiment
    from speechlm2_jax.inspection.page import write_page

    with experiment.clear_errors(program), console.showing(is_shown=True):
        run = experiment.read_run(command.config, command.overrides, over=command.over)
        built = run.build(dry_run=True)
        model, datamodule = built.model, built.datamodule
        with console.phase("reading the data"):
            datamodule.setup(frame_count=model.frame_count)
        with console.phase("writing the page"):
            write_page(
                output,
                datamodule,
                model.tokenizer,
                title=" + ".join([command.config, *command.over]),
                count=count,
            )
        print(f"page: {output}  (open it in a browser)")


if __name__ == "__main__":
    console.ignore_closed_pipes()
    main(sys.argv[1:])
