"""Trains a speech language model: python train.py --config NAME_OR_PATH [key=value ...]."""

import sys

from speechlm2_jax.settings import parse_cli


def main(argv: list[str]) -> None:
    """Parses arguments, builds, runs. Bad input is one clear line and exit code 2."""
    from speechlm2_jax import experiment

    with experiment.clear_errors("train.py"):
        config, overrides = parse_cli(argv)
        experiment.build(config, overrides).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
