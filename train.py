"""Trains a speech language model: python train.py --config NAME_OR_PATH [key=value ...].

The code is speechlm2_jax/commands/train.py; `speechlm2-jax train` is the same command.
"""

import sys

from speechlm2_jax.commands.train import main, run

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], program="train.py"))
