"""Turns any checkpoint into a safetensors directory or a .nemo file, or lists what is in it.

python convert.py SOURCE TARGET_DIR
python convert.py SOURCE TARGET_DIR --to hf
python convert.py SOURCE TARGET.nemo
python convert.py SOURCE TARGET --dtype bfloat16
python convert.py SOURCE --inspect

SOURCE: a run directory, a saved or NeMo model directory, a Hugging Face directory, a torch
distributed checkpoint (.metadata and *.distcp), or a file (.nemo, .ckpt, .bin, .pt, .safetensors,
a shard index). A speech model becomes a directory that this project and NeMo load (--to nemo), or
its LLM alone one that transformers loads (--to hf). The run of a CTC model becomes a .nemo file.
Anything else keeps its tensor names. A TARGET.nemo needs a SOURCE with model_config.yaml: a .nemo
file, or a directory made from one. Nothing in SOURCE is ever executed.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechlm2_jax import console
from speechlm2_jax.conversion.casting import DTYPES
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.listing import lines, table
from speechlm2_jax.conversion.readers import open_weights, read_json
from speechlm2_jax.conversion.repacking import (
    NEMO_SUFFIX,
    check_target,
    repack,
    weights_path,
)
from speechlm2_jax.parameter_paths import PatternError
from speechlm2_jax.pretrained.locate import nearest_path
from speechlm2_jax.settings import SettingsError

FORMATS = ("nemo", "hf")


def main(argv: Sequence[str]) -> int:
    """Converts or lists; 2 after one line on what is wrong with the input, if anything is."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
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
    parser.add_argument("--inspect", action="store_true", help="list the tensors, write nothing")
    arguments = parser.parse_args(argv)
    if (arguments.target is None) != arguments.inspect:
        parser.error("give either TARGET or --inspect")
    try:
        if not arguments.source.exists() and (near := nearest_path(str(arguments.source))):
            raise ConversionError(f"{arguments.source} does not exist; did you mean {near!r}?")
        if arguments.inspect:
            print(table(open_weights(arguments.source)))
        else:
            convert(arguments)
    except (ConversionError, SettingsError, PatternError, OSError) as error:
        print("convert.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def convert(arguments: argparse.Namespace) -> None:
    """Writes the target, and prints the tensors to look at."""
    from speechlm2_jax import models
    from speechlm2_jax.checkpointing import DamagedError
    from speechlm2_jax.pretrained import registry

    source, target, dtype = arguments.source, arguments.target, arguments.dtype
    check_target(target)
    kind = registry.identify(source) if source.exists() else None
    if kind is None and (source / registry.CONFIG).is_file():
        read_json(source / registry.CONFIG)  # a damaged one is refused by name
    name = kind.classes[0] if kind is not None and kind.classes else ""
    try:
        if name in registry.SPEECH_MODELS:
            if target.suffix == NEMO_SUFFIX:
                raise ConversionError(f"{target}: NeMo keeps speech LLMs as directories; name one")
            write_speech_model(getattr(models, name).from_pretrained(source), arguments)
        elif arguments.to == "hf" and not (kind is not None and kind.is_llm):
            raise ConversionError(f"{source} has no LLM, which --to hf writes; leave --to out")
        elif arguments.merge_lora is not None:
            raise ConversionError(f"{source} is not a speech model; leave --merge-lora out")
        elif name and registry.is_run(source):
            if target.suffix != NEMO_SUFFIX:
                raise ConversionError(f"{target}: a CTC model is a .nemo file; name one")
            models.CTCModel.from_pretrained(source).save_to(target, dtype=dtype)
        else:
            repack(source, target, dtype)
    except DamagedError as error:
        raise ConversionError(str(error)) from error
    written = open_weights(weights_path(target))
    print(f"{weights_path(target)}: {len(written.infos)} tensors")
    for line in filter(lambda line: line.is_suspect, lines(written)):
        print(f"look at {line.name}: {line.note}")


def write_speech_model(model: Any, arguments: argparse.Namespace) -> None:
    """Writes the whole model for NeMo, or its LLM alone for transformers."""
    merges = arguments.merge_lora
    if arguments.to == "hf":
        model.save_llm(arguments.target, merge_lora=merges is not False, dtype=arguments.dtype)
    else:
        model.save_pretrained(arguments.target, merge_lora=bool(merges), dtype=arguments.dtype)


if __name__ == "__main__":
    console.ignore_closed_pipes()
    sys.exit(main(sys.argv[1:]))
