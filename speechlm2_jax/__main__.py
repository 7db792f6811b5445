"""`python -m speechlm2_jax` is the command `speechlm2-jax`."""

import sys

from speechlm2_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
