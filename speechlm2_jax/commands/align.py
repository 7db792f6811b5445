"""`speechlm2-jax align`: adds the times of words to each row of a manifest.

    speechlm2-jax align test.jsonl --aligner nvidia/parakeet-ctc-0.6b
    speechlm2-jax align train.jsonl --aligner asr.nemo --output timed/train.jsonl

A row has `audio_filepath` and `text`, and gets `words`: text, start and end of each, in seconds.
Rows that cannot be aligned are counted, and tell the reason in `alignment_problem`. A stopped run
resumes with the same command, which tries recordings again that could not be read.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax import console
from speechlm2_jax.inference.timestamps import DEFAULT_ALIGNER
from speechlm2_jax.settings import SettingsError

PROGRAM = "speechlm2-jax align"


def main(argv: Sequence[str], *, program: str = PROGRAM) -> int:
    """Aligns; 0, 1 if some rows could not be aligned, 2 after one line on bad input."""
    options = _parser(program).parse_args(argv)
    with console.showing(), console.phase("importing"):
        from speechlm2_jax.compilation_cache import keep_compiled_programs
        from speechlm2_jax.conversion.errors import ConversionError
    kept = "what is written is kept, and the same command resumes"
    errors = [SettingsError, ConversionError]
    with console.one_line_errors(program, errors, kept=kept), console.showing():
        keep_compiled_programs("auto")
        return _align(options)


def _align(options: argparse.Namespace) -> int:
    from speechlm2_jax.alignment.manifests import align_manifest, sample_problems
    from speechlm2_jax.evaluation.progress import ProgressDisplay
    from speechlm2_jax.inference.timestamps.aligner import Aligner
    from speechlm2_jax.models.aligners import open_aligner

    def opened() -> Aligner:
        with console.phase(f"loading {options.aligner}"):
            return open_aligner(options.aligner, key="--aligner")

    progress: ProgressDisplay | None = None
    shown, start_s = 0, time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal progress, shown, start_s
        if progress is None:
            start_s = time.monotonic()
            progress = ProgressDisplay(total, done, what="aligned")
        else:
            progress.update(done - shown)
        shown = done

    try:
        totals = align_manifest(
            *(options.manifest, opened, options.output),
            overwrite=options.overwrite,
            model=options.aligner,
            report=report,
        )
    finally:
        if progress is not None:
            progress.__exit__()
    if totals.resumed:
        console.log_line(f"{totals.resumed} of {totals.rows} rows were there already")
    speed = totals.audio_s / max(time.monotonic() - start_s, 1e-9)
    console.log_line(
        f"{totals.output}: {console.counted(totals.rows, 'row')}, {totals.audio_s:.0f} s of audio, "
        f"{speed:.1f} s of audio per second"
    )
    if not totals.problems:
        return 0
    console.log_line(f"{console.counted(len(totals.problems), 'row')} could not be aligned:")
    for line in sample_problems(totals):
        console.log_line(f"  {line}")
    return 1


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, help="a manifest of JSON lines")
    parser.add_argument(
        "--aligner",
        default=DEFAULT_ALIGNER,
        metavar="NAME",
        help="an ASR model with a CTC head, or a transducer: a .nemo file, a run, or a hub name; "
        f"of a SALM, its encoder's CTC head ({DEFAULT_ALIGNER})",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="(NAME_words.jsonl beside the manifest)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is written")
    return parser
