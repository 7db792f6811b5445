"""`speechlm2-jax manifest`: a folder of recordings and texts -> checked, split manifests.

    speechlm2-jax manifest my_recordings
    speechlm2-jax manifest clips --output data --split train=0.9,test=0.1

The texts may be a text file or a JSON file beside each recording, a CSV or TSV table, or in the
layout of Common Voice, LibriSpeech, LJSpeech or a Hugging Face audiofolder. Sets that the folder
has itself are kept. Recordings that cannot be trained on are left out; left_out.jsonl lists them
with the reason.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax import console
from speechlm2_jax.settings import SettingsError

PROGRAM = "speechlm2-jax manifest"


def main(argv: Sequence[str], *, program: str = PROGRAM) -> None:
    """Writes the manifests and prints what was found. Bad input: one line, exit code 2."""
    with console.one_line_errors(program, [SettingsError]):
        parser = argparse.ArgumentParser(
            prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add, default = parser.add_argument, argparse.SUPPRESS
        add("folder", type=Path, help="the folder of recordings")
        add("--output", type=Path, default=default, help="folder of the manifests (the same)")
        add(
            *("--split",),
            default=default,
            help="sets and their shares of the seconds (train=0.9,validation=0.05,test=0.05)",
        )
        add(
            *("--by",),
            choices=("auto", "speaker", "file"),
            default=default,
            help="what no two sets share (auto: speakers if all are known)",
        )
        add("--seed", type=int, default=default, help="of the split (0)")
        add("--min-duration", type=float, default=default, help="shortest, in seconds (0.1)")
        add("--max-duration", type=float, default=default, help="longest, in seconds (40)")
        for name, text in (
            ("--resplit", "split anew what the folder has in sets (train, dev, test, ...)"),
            ("--keep-copies", "keep recordings with the same samples"),
            ("--overwrite", "replace manifests that are there"),
        ):
            add(name, action="store_true", default=default, help=text)
        choices = vars(parser.parse_args(argv))
        from speechlm2_jax.data.folders.manifests import Choices, make_manifests

        folder = choices.pop("folder")
        if "output" not in choices and folder.is_dir():
            print(f"manifests: written to {folder}, the folder of the recordings, without --output")
        for line in make_manifests(folder, Choices(**choices)):
            print(line)
