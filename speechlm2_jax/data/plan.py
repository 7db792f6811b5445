"""Plans the batches of a configuration: bins, and for each the most rows that fit a device.

    python -m speechlm2_jax.data.plan salm
    python -m speechlm2_jax.data.plan my.yaml --buckets 20 --memory-gib 80 key=value ...
    python train.py --config my.yaml --config plan.yaml key=value ...

The training program of each bin is compiled with two numbers of rows, and its memory, which grows
evenly with rows, tells the most that fit. Nothing is tried on the device. The plan is a YAML file
with NeMo's keys. The configuration, several `--config FILE` and `key=value` are as in training.
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

PROGRAM = "plan"
MODULE = "python -m speechlm2_jax.data.plan"
TRAIN = "python train.py"
"""How a training is started in the clone; an installed package has no train.py."""


def main(argv: Sequence[str], *, program: str = PROGRAM) -> None:
    """Prints the plan and writes it. Bad input: one line, exit code 2; Ctrl-C: 130."""
    with console.one_line_errors(program, [SettingsError], kept=console.INDEX_KEPT):
        _make(*parse_settings(_parser(program), argv), argv, program)


def _make(
    arguments: argparse.Namespace, command: SettingsCommand, argv: Sequence[str], program: str
) -> None:
    from speechlm2_jax import experiment
    from speechlm2_jax.compilation_cache import keep_compiled_programs
    from speechlm2_jax.planning.options import PlanOptions, parse_pair
    from speechlm2_jax.planning.plan import make_plan
    from speechlm2_jax.planning.report import table, training_command, write_yaml
    from speechlm2_jax.settings import ignored_report

    with experiment.clear_errors(program), console.showing(is_shown=True), ignored_report():
        pair = arguments.buckets_2d
        options = PlanOptions(
            buckets=arguments.buckets,
            buckets_2d=None if pair is None else parse_pair(pair),
            memory_gib=arguments.memory_gib,
            memory_fraction=arguments.memory_fraction,
            max_rows=arguments.max_rows,
            is_timed=not arguments.no_timing,
            topology=arguments.compile_for,
            libtpu=arguments.libtpu,
        )
        run = experiment.read_run(command.config, command.overrides, over=command.over)
        trainer = run.values.get("trainer") or {}
        keep_compiled_programs(trainer.get("compilation_cache_dir", "auto"))
        plan = make_plan(run, options)
        print(table(plan))
        write_yaml(arguments.output, plan, [*_typed(program).split(), *argv])
        print(f"plan: {arguments.output}; train with it by")
        print(training_command(_train(program).split(), command, arguments.output, plan))


def _typed(program: str) -> str:
    """What starts this program."""
    return MODULE if program == PROGRAM else program


def _train(program: str) -> str:
    """What starts a training where this program was started as `program`."""
    return TRAIN if program == PROGRAM else program.replace(PROGRAM, "train")


def _parser(program: str) -> argparse.ArgumentParser:
    typed = _typed(program)
    text = (__doc__ or "").replace(MODULE, typed).replace(TRAIN, _train(program))
    parser = settings_parser(typed, text)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--output", type=Path, default=Path("plan.yaml"), help="the YAML file that is written")
    add("--buckets", type=int, help="bins to estimate; else the configuration's, or 8")
    add("--buckets-2d", metavar="N,M", help="bins of N input lengths times M output lengths")
    add("--memory-gib", type=float, help="memory of a device; else the device's own")
    add("--memory-fraction", type=float, help="share that a program may need: 0.9, of a CPU 0.6")
    add("--max-rows", type=int, help="most rows of any bin")
    add("--no-timing", action="store_true", help="only compile; run nothing")
    add("--compile-for", metavar="TOPOLOGY", help="TPUs that are not attached, such as v5e:4x4")
    add("--libtpu", type=Path, metavar="DIR", help="filled by python -m speechlm2_jax.aot.fetch")
    return parser


if __name__ == "__main__":
    console.ignore_closed_pipes()
    main(sys.argv[1:])
