"""Trains a speech language model: python train.py --config NAME_OR_PATH [key=value ...]."""

import sys

from speechlm2_jax.settings import SettingsError, find, parse_train
from speechlm2_jax.training import terminal

PROGRAM = "train.py"


def main(argv: list[str]) -> None:
    """Parses arguments, builds, runs. Bad input is one clear line and exit code 2."""
    with terminal.one_line_errors(PROGRAM, [SettingsError]), terminal.showing():
        command = parse_train(argv)
        terminal.say(f"speechlm2_jax: reading {find(command.config)} ...")
        with terminal.phase("importing"):
            from speechlm2_jax import experiment

        words = command.config, command.overrides
        with experiment.clear_errors(PROGRAM):
            if command.dry_run:
                experiment.build(*words, only_describes=True).dry_run()
            elif not experiment.is_finished(*words):
                experiment.build(*words, keeps_compiled=True).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
