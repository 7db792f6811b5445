"""Evaluates a speech model: python evaluate.py [pretrained_name=RUN] [key=value ...].

The code is speechlm2_jax/commands/evaluate.py; `speechlm2-jax evaluate` is the same command.
"""

import sys

from speechlm2_jax.commands.evaluate import main, run

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], program="evaluate.py"))
