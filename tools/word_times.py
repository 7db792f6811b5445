"""Measures word times against those that the synthesizer tells, or chooses the constants of Timing.

    python -m tools.word_times [--aligner MODEL] [--table TABLE.jsonl] [--choose]

TABLE is made by tools/corpus/make_word_times.py; the default is that of the bundled test set. The
default aligner is the bundled encoder. `--choose` prints the constants with the least error on the
table, which must not be the test's.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.data.audio import read_audio
from speechlm2_jax.inference.timestamps.aligner import AlignedLabels, Aligner
from speechlm2_jax.inference.timestamps.bounds import Timing
from speechlm2_jax.inference.timestamps.word_times import word_times
from speechlm2_jax.models.aligners import open_aligner

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "data" / "word_times" / "test.jsonl"
ENCODER = ROOT / "configs" / "parts" / "tiny_encoder.nemo"
CLOSE_S = 0.16
GRID = {
    "emission_point": (0.5, 0.625, 0.75, 0.875),
    "delay_frames": (0.5, 0.75, 0.875, 1.0, 1.25),
    "letter_sd_s": (0.02, 0.03, 0.045),
}


@dataclass(frozen=True)
class Errors:
    """Signed errors in seconds: what was found, less what is true."""

    starts: np.ndarray
    ends: np.ndarray
    unfitting: int
    """Recordings whose text did not fit."""

    def __str__(self) -> str:
        lines = [
            "| | words | mean error | within 160 ms | 90th percentile | mean of signed errors |"
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, errors in (("starts", self.starts), ("ends", self.ends)):
            p90_ms, bias_ms = np.quantile(abs(errors), 0.9) * 1000, errors.mean() * 1000
            lines.append(
                f"| {name} | {len(errors)} | {mean_ms(errors):.0f} ms | {share_close(errors):.1%} "
                f"| {p90_ms:.0f} ms | {bias_ms:+.0f} ms |"
            )
        return "\n".join([*lines, f"{self.unfitting} texts did not fit their recordings"])


def mean_ms(errors: np.ndarray) -> float:
    """Mean of absolute errors in milliseconds."""
    return float(abs(errors).mean() * 1000)


def share_close(errors: np.ndarray) -> float:
    """Share of errors within CLOSE_S."""
    return float((abs(errors) <= CLOSE_S).mean())


@dataclass(frozen=True)
class Truth:
    """A recording, its text, and when its words begin and end, where that is known."""

    wave: np.ndarray
    text: str
    starts: tuple[float | None, ...]
    ends: tuple[float | None, ...]


def read_table(path: Path, rate_hz: int) -> list[Truth]:
    """Reads the rows of a table, and their recordings from the bundled corpus."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Truth(
            read_audio(ROOT / "corpus" / row["audio_filepath"], sample_rate_hz=rate_hz),
            row["text"],
            tuple(row["starts"]),
            tuple(row["ends"]),
        )
        for row in rows
    ]


def measure(rows: Sequence[Truth], aligner: Aligner, timing: Timing | None = None) -> Errors:
    """Aligns the texts and compares."""
    waves, texts = [row.wave for row in rows], [row.text for row in rows]
    found = word_times(waves, texts, aligner, timing=timing)
    pairs = list(zip(rows, found, strict=True))
    starts = [
        word.start - true
        for row, own in pairs
        for word, true in zip(own.words, row.starts, strict=True)
        if true is not None
    ]
    ends = [
        word.end - true
        for row, own in pairs
        for word, true in zip(own.words, row.ends, strict=True)
        if true is not None
    ]
    unfitting = sum(own.problem is not None for own in found)
    return Errors(np.array(starts), np.array(ends), unfitting)


class Remembered:
    """An aligner whose frames are found once, for many values of `Timing`."""

    def __init__(self, aligner: Aligner) -> None:
        self.sampling_rate, self.frame_s = aligner.sampling_rate, aligner.frame_s
        self.timing = aligner.timing
        self._aligner = aligner
        self._found: list[AlignedLabels] | None = None

    def align(
        self, waves: Sequence[np.ndarray], words: Sequence[Sequence[str]]
    ) -> list[AlignedLabels]:
        """Aligns the same recordings at every call."""
        self._found = self._found or self._aligner.align(waves, words)
        return self._found


def choose(rows: Sequence[Truth], aligner: Aligner) -> Timing:
    """The constants of GRID with the least mean error of starts and ends together."""
    remembered = Remembered(aligner)
    choices = [
        replace(aligner.timing, **dict(zip(GRID, values, strict=True)))
        for values in itertools.product(*GRID.values())
    ]

    def cost(timing: Timing) -> float:
        errors = measure(rows, remembered, timing)
        return mean_ms(errors.starts) + mean_ms(errors.ends)

    return min(choices, key=cost)


def main() -> None:
    """Prints the table, or the constants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aligner", default=str(ENCODER))
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--choose", action="store_true")
    arguments = parser.parse_args()
    keep_compiled_programs("auto")
    aligner = open_aligner(arguments.aligner)
    rows = read_table(arguments.table, aligner.sampling_rate)
    timing = choose(rows, aligner) if arguments.choose else aligner.timing
    if arguments.choose:
        print(timing)
    print(measure(rows, aligner, timing))


if __name__ == "__main__":
    main()
