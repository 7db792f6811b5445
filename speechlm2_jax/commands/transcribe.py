"""`speechlm2-jax transcribe`: recordings in, texts or subtitles out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speechlm2_jax.bundled import page

if TYPE_CHECKING:
    from speechlm2_jax.transcription.inputs import GivenRecording
    from speechlm2_jax.transcription.opening import OpenedModel, Options
    from speechlm2_jax.transcription.outputs import Outputs

PROGRAM = "speechlm2-jax transcribe"
DESCRIPTION = """\
Transcribes recordings of any length with a speech LLM or an ASR model.

  speechlm2-jax transcribe interview.m4a
  speechlm2-jax transcribe interview.m4a lectures/ --model nvidia/canary-qwen-2.5b --output srt
  speechlm2-jax transcribe calls.jsonl --model runs/salm --output json,txt --output-dir texts
  find . -name '*.mp3' | speechlm2-jax transcribe - --output vtt
"""
EPILOG = """\
The text of one recording is printed. Those of several, and every other format, are written beside
the recordings, or into --output-dir. What is written already is skipped, so that the same command
resumes. A file that this command did not write is never replaced. Without --model, the newest run
below ./runs that can transcribe does.
"""
TIMED = ("srt", "vtt", "tsv", "json", "jsonl")
"""Formats that show times."""


def main(argv: Sequence[str], *, program: str = PROGRAM) -> int:
    """Transcribes; 0, 1 if some recordings could not be read, 2 after one line on bad input."""
    arguments = _parser(program).parse_intermixed_args(argv)
    from speechlm2_jax import console
    from speechlm2_jax.conversion.errors import ConversionError
    from speechlm2_jax.settings import SettingsError

    errors = [SettingsError, ConversionError, ValueError]
    kept = "nothing was transcribed"
    with console.one_line_errors(program, errors, kept=kept), console.showing(is_stderr=True):
        return _transcribe(arguments, program)


def _transcribe(arguments: argparse.Namespace, program: str) -> int:
    # mistakes that are cheap to find come before the imports that are not
    formats = _formats(arguments.output)
    timestamps = _timestamps(arguments, formats)
    sources = _sources(arguments)

    from speechlm2_jax import console
    from speechlm2_jax.transcription.opening import choose_model
    from speechlm2_jax.transcription.outputs import Outputs

    options = _options(arguments, timestamps)
    name = choose_model(arguments.model)
    if formats == ("txt",) and len(sources) == 1 and arguments.output_dir is None:
        return _run(arguments, program, name, options, sources, None)
    outputs = Outputs(formats=formats, folder=arguments.output_dir, overwrite=arguments.overwrite)
    with outputs.locked():
        left = outputs.prepare(sources)
        if len(left) < len(sources):
            skipped = len(sources) - len(left)
            console.log_line(f"{skipped} of {len(sources)} are transcribed already and skipped")
        if outputs.changed and not arguments.overwrite:
            names = ", ".join(source.name for source in outputs.changed[:3])
            more = ", ..." if len(outputs.changed) > 3 else ""
            console.log_line(
                f"changed since they were transcribed, and transcribed again: {names}{more}"
            )
        if not left:
            console.log_line("nothing is left to do; --overwrite transcribes again")
            return 0
        return _run(arguments, program, name, options, left, outputs)


def _run(
    arguments: argparse.Namespace,
    program: str,
    name: str,
    options: "Options",
    sources: "Sequence[GivenRecording]",
    outputs: "Outputs | None",
) -> int:
    """Opens the model and transcribes; `outputs` None prints the texts, and nothing else."""
    from speechlm2_jax import console
    from speechlm2_jax.transcription.progress import AudioProgress, duration
    from speechlm2_jax.transcription.run import transcribe_all

    note = console.log_line if outputs is not None else lambda _text: None
    note(f"model: {name}")
    model = _open(name, options)
    audio_s = sum(source.utterance.duration_s for source in sources)
    kept = "what is written is kept, and the same command"
    kept += " without --overwrite resumes" if arguments.overwrite else " resumes"
    size = 4 * arguments.batch_size
    with (
        console.one_line_errors(program, [], kept=kept),
        AudioProgress(len(sources), audio_s) as progress,
    ):
        totals = transcribe_all(sources, model, outputs, progress, group_size=size)
        speed = progress.speed()
    files, failed = (console.counted(n, "recording") for n in (totals.files, totals.failed))
    note(
        f"transcribed {files}, {duration(totals.audio_s)} of audio, "
        f"{speed:.1f} s of audio per second"
    )
    if totals.files and outputs is not None:
        note(f"written to {outputs.place()}")
    if totals.failed:
        print(f"{program}: left out: {failed}", file=sys.stderr)
    return 1 if totals.failed else 0


def _sources(arguments: argparse.Namespace) -> "list[GivenRecording]":
    """The recordings. Raises SettingsError, also where there is no model for them."""
    if arguments.model is None:
        from speechlm2_jax.transcription.missing_model import check_there_are_runs

        check_there_are_runs()
    from speechlm2_jax import console
    from speechlm2_jax.transcription.inputs import find_sources

    with console.phase("looking for recordings"):
        return find_sources(arguments.inputs)


def _open(name: str, options: "Options") -> "OpenedModel":
    """Imports JAX and opens the model, after all that can be wrong with the other arguments."""
    from speechlm2_jax import console, garbage_collection
    from speechlm2_jax.transcription.opening import open_model

    with garbage_collection.paused():
        with console.phase("importing"):
            from speechlm2_jax.compilation_cache import keep_compiled_programs
        keep_compiled_programs("auto")
        with console.phase(f"loading {name}"):
            return open_model(name, options)


def _timestamps(arguments: argparse.Namespace, formats: Sequence[str]) -> str | None:
    """What has times, by default words where a format shows them."""
    from speechlm2_jax import settings

    if set(formats) & set(TIMED):
        return arguments.timestamps or "word"
    for flag in ("timestamps", "aligner"):
        if getattr(arguments, flag):
            raise settings.SettingsError(
                f"--{flag}: {', '.join(formats)} shows no times; add a format that does, as "
                "--output txt,json, or leave it out"
            )
    return None


def _options(arguments: argparse.Namespace, timestamps: str | None) -> "Options":
    from speechlm2_jax import settings
    from speechlm2_jax.transcription.opening import Options

    return Options(
        prompt=arguments.prompt,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        max_audio_s=arguments.max_audio_s,
        timestamps=timestamps,
        aligner=arguments.aligner,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        generation=settings.override({}, [f"+{text}" for text in arguments.generation]),
    )


def _formats(text: str) -> tuple[str, ...]:
    from speechlm2_jax.inference.transcript_files import FORMATS
    from speechlm2_jax.settings import SettingsError

    formats = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for form in formats:
        if form not in FORMATS:
            raise SettingsError(f"--output: {form!r} is no format; use {', '.join(FORMATS)}")
    return formats


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="audio or video files, folders, patterns ('a/**/*.wav'), manifests (.jsonl), "
        "addresses, or - for a list on standard input",
    )
    _add_model(parser.add_argument_group("model"))
    _add_output(parser.add_argument_group("output"))
    _add_generation(parser.add_argument_group("generation"))
    return parser


def _add_model(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--model",
        metavar="NAME",
        help="a run, a model directory, a .nemo file, or a hub name such as "
        "nvidia/canary-qwen-2.5b or OWNER/NAME@REVISION (default: the newest run below "
        "./runs that transcribes)",
    )
    model.add_argument(
        "--prompt",
        help="what a speech LLM is asked (default: the prompt of its training)",
    )
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation "
        "(default: that of the training; else float32 on a CPU, bfloat16 elsewhere)",
    )
    model.add_argument(
        "--quantize", choices=("int8", "fp8"), help="hold the LLM in 8 bits (default: no)"
    )


def _add_output(output: argparse._ArgumentGroup) -> None:
    output.add_argument(
        "--output",
        default="txt",
        metavar="FORMAT[,FORMAT]",
        help="txt, json, jsonl, srt, vtt or tsv (default: txt)",
    )
    output.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="(default: beside each recording)"
    )
    output.add_argument(
        "--overwrite", action="store_true", help="transcribe again what this command wrote"
    )
    output.add_argument(
        "--timestamps",
        choices=("word", "segment"),
        help="times of words, or of segments alone (default: word, for formats with times)",
    )
    output.add_argument(
        "--aligner",
        metavar="NAME",
        help="the ASR model that finds the times of words (default: the model's own CTC head, "
        "else nvidia/parakeet-ctc-0.6b)",
    )


def _add_generation(generation: argparse._ArgumentGroup) -> None:
    generation.add_argument(
        "--batch-size", type=_positive, default=8, help="recordings at once (default: 8)"
    )
    generation.add_argument(
        "--max-audio-s",
        type=_seconds,
        metavar="SECONDS",
        help="cut longer audio at pauses (default: the longest of the training, else 40)",
    )
    generation.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="longest text of a part of a recording (default: 256)",
    )
    generation.add_argument(
        "--set",
        dest="generation",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"a keyword of generate, such as num_beams=4 ({page('generation.md')})",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not number >= 1:
        raise argparse.ArgumentTypeError("must be at least 1 second")
    return number
