"""Converts a checkpoint: python convert.py SOURCE TARGET.

The code is speechlm2_jax/commands/convert.py; `speechlm2-jax convert` is the same command.
"""

import sys

from speechlm2_jax.commands.convert import main, run

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], program="convert.py"))
