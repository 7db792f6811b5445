"""Turns any checkpoint into a safetensors directory or a .nemo file, or lists what is in it.

python convert.py SOURCE TARGET_DIR
python convert.py SOURCE TARGET_DIR --to hf
python convert.py SOURCE TARGET.nemo
python convert.py SOURCE TARGET --dtype bfloat16
python convert.py SOURCE --inspect

SOURCE: a run directory, a saved or NeMo model directory, a Hugging Face directory, a torch
distributed checkpoint (.metadata and *.distcp), or a file (.nemo, .ckpt, .bin, .pt, .safetensors,
.gguf, a shard index). A speech model becomes a directory that this project and NeMo load (--to
nemo), or its LLM alone one that transformers loads (--to hf). The run of a CTC model becomes a
.nemo file, a .gguf file a Hugging Face directory. Anything else keeps its tensor names. A
TARGET.nemo needs a SOURCE with model_config.yaml: a .nemo file, or a directory made from one.
Nothing in SOURCE is ever executed. At the end the target is opened again and compared with the
source; exit code 1 means that they differ.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speechlm2_jax import console
from speechlm2_jax.usage import print_help_if_asked

if TYPE_CHECKING:
    from speechlm2_jax.conversion.readers import LazySource

PROGRAM = "convert.py"
FORMATS = ("nemo", "hf")


def run(argv: Sequence[str], *, program: str = PROGRAM) -> int:
    """Converts or lists; see `main`. --help imports nothing slow."""
    print_help_if_asked(__file__, argv=argv, program=program)
    console.ignore_closed_pipes()
    return main(argv, program=program)


def main(argv: Sequence[str], *, program: str = PROGRAM) -> int:
    """Converts or lists; 2 after one line on what is wrong with the input, if anything is."""
    from speechlm2_jax.conversion.errors import ConversionError, SelfTestError
    from speechlm2_jax.conversion.listing import table
    from speechlm2_jax.parameter_paths import PatternError
    from speechlm2_jax.pretrained.near_paths import nearest_path
    from speechlm2_jax.settings import SettingsError

    arguments = _arguments(argv, program)
    try:
        if not arguments.source.exists() and (near := nearest_path(str(arguments.source))):
            raise ConversionError(f"{arguments.source} does not exist; did you mean {near!r}?")
        if arguments.inspect:
            print(table(_weights(arguments.source)))
        else:
            convert(arguments)
    except (ConversionError, SettingsError, PatternError, OSError) as error:
        print(f"{program}:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, SelfTestError) else 2
    return 0


def _weights(source: Path) -> "LazySource":
    """The tensors of SOURCE; of a run, the variables of its best checkpoint, else of its last."""
    from speechlm2_jax import checkpointing
    from speechlm2_jax.conversion.errors import ConversionError
    from speechlm2_jax.conversion.readers import memory_source, open_weights
    from speechlm2_jax.pretrained.registry import is_run

    if not is_run(source):
        return open_weights(source)
    try:
        weights = checkpointing.load_weights(source)
    except checkpointing.DamagedError as error:
        raise ConversionError(str(error)) from error
    print(f"{source}: step {weights.step}")
    return memory_source(weights.variables)


def _arguments(argv: Sequence[str], program: str) -> argparse.Namespace:
    from speechlm2_jax.conversion.casting import DTYPES

    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET", nargs="?")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        help="of a speech model: the directory that NeMo reads (default), or a Hugging Face\n"
        "directory of its LLM alone",
    )
    parser.add_argument(
        "--merge-lora",
        action=argparse.BooleanOptionalAction,
        help="add LoRA adapters to the weights (default with --to hf); with --no-merge-lora\n"
        "--to hf writes them to the folder adapter as PEFT does",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of every floating tensor (default: kept)")
    parser.add_argument(
        "--self-test",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="open the target again and compare a small forward pass with the source's",
    )
    parser.add_argument("--inspect", action="store_true", help="list the tensors, write nothing")
    arguments = parser.parse_args(argv)
    if (arguments.target is None) != arguments.inspect:
        parser.error("give either TARGET or --inspect")
    return arguments


def convert(arguments: argparse.Namespace) -> None:
    """Writes the target, and prints what was loaded, what was written and how it was checked."""
    from speechlm2_jax.checkpointing import DamagedError
    from speechlm2_jax.conversion.errors import ConversionError
    from speechlm2_jax.conversion.repacking import check_target
    from speechlm2_jax.models.export import ExportOptions, export

    check_target(arguments.target)
    options = ExportOptions(
        format=arguments.to,
        merge_lora=arguments.merge_lora,
        dtype=arguments.dtype,
        has_self_test=arguments.self_test,
    )
    try:
        for line in export(arguments.source, arguments.target, options):
            print(line)
    except DamagedError as error:
        raise ConversionError(str(error)) from error
