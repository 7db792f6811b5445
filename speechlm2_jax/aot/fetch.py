"""Fetches the libtpu that fits: python -m speechlm2_jax.aot.fetch [--to FOLDER]."""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import sys
from pathlib import Path

from speechlm2_jax.aot.chips import default_folder, fetch
from speechlm2_jax.settings import SettingsError


def main() -> None:
    """Reads the command line and fetches."""
    parser = argparse.ArgumentParser(prog="python -m speechlm2_jax.aot.fetch")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help=f"default: {default_folder()}")
    folder = parser.parse_args().to or default_folder()
    try:
        fetch(folder)
    except SettingsError as error:
        sys.exit(f"fetch: {error}")
    print(f"libtpu is in {folder}; train.py --compile-for TOPOLOGY --libtpu {folder}")


if __name__ == "__main__":
    main()
