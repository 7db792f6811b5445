"""Trains a speech language model: python train.py --config NAME_OR_PATH [key=value ...]."""

import sys

from speechlm2_jax import experiment
from speechlm2_jax.settings import parse_cli


def main() -> int:
    """Parses arguments, builds, runs. Bad input is one clear line and exit code 2."""
    with experiment.clear_errors():
        config, overrides = parse_cli(sys.argv[1:])
        run = experiment.build(config, overrides)
        return run.fit()


if __name__ == "__main__":
    sys.exit(main())
