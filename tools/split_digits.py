"""Splits a folder of spoken digits by recording, and joins recordings to strings.

    python tools/split_digits.py FSDD_FOLDER OUT_FOLDER [--leave-out SPEAKER]

The folder holds `train_digits.jsonl` (single recordings) and `train_strings.jsonl` (recordings
joined with silence). A string is found to contain a recording by its exact samples. Recordings
05 to 09 of every digit and speaker are held out: a string that contains one leaves the training
set, and held-out strings are joined from held-out recordings alone. Training strings are joined
from training recordings alone, each with other lengths of silence. With --leave-out, one
speaker is held out whole, in files of his own. Writes train.jsonl, held_out_digits.jsonl,
held_out_strings.jsonl, overfit_64.jsonl, left_out_digits.jsonl, left_out_strings.jsonl and the
strings' audio.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile

HELD_OUT = {"05", "06", "07", "08", "09"}
HELD_OUT_STRINGS, TRAINING_STRINGS = 120, 4000
KEY_SAMPLES = 16
RATE_HZ = 8000


def read_manifest(path: Path) -> list[dict]:
    """Reads a JSON-lines manifest and makes its audio paths absolute."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**row, "audio_filepath": str(path.parent / row["audio_filepath"])} for row in rows]


def samples(row: dict) -> np.ndarray:
    """The recording's int16 samples."""
    return soundfile.read(row["audio_filepath"], dtype="int16")[0]


def recordings_in(string: np.ndarray, index: dict, digits: dict[str, np.ndarray]) -> set[str]:
    """Names every recording whose samples occur in `string`."""
    found = set()
    content = string.tobytes()
    for i in range(len(string) - KEY_SAMPLES):
        for name, middle in index.get(content[2 * i : 2 * (i + KEY_SAMPLES)], ()):
            start, digit = i - middle, digits[name]
            if start >= 0 and np.array_equal(string[start : start + len(digit)], digit):
                found.add(name)
    return found


def join(parts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Joins recordings with 30 to 250 ms of silence."""
    pieces = [parts[0]]
    for part in parts[1:]:
        pieces += [np.zeros(int(rng.uniform(0.03, 0.25) * RATE_HZ), np.int16), part]
    return np.concatenate(pieces)


def make_strings(rows: list[dict], count: int, out: Path, seed: int) -> list[dict]:
    """Joins 2 to 7 recordings of one speaker into each of `count` strings."""
    rng = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    by_speaker = defaultdict(list)
    for row in rows:
        by_speaker[row["speaker"]].append((row, samples(row)))
    strings = []
    for i in range(count):
        speaker = sorted(by_speaker)[i % len(by_speaker)]
        known = by_speaker[speaker]
        chosen = rng.choice(len(known), rng.integers(2, 8), replace=False)
        parts = [known[c] for c in chosen]
        wave = join([wave for _, wave in parts], rng)
        path = out / f"{i:05d}.flac"
        soundfile.write(path, wave, RATE_HZ)
        strings.append(
            {
                "audio_filepath": str(path),
                "duration": len(wave) / RATE_HZ,
                "text": " ".join(row["text"] for row, _ in parts),
                "speaker": speaker,
            }
        )
    return strings


def main(source: Path, out: Path, left_out: str | None) -> None:
    """Writes the manifests."""
    out.mkdir(parents=True, exist_ok=True)
    digit_rows = read_manifest(source / "train_digits.jsonl")
    string_rows = read_manifest(source / "train_strings.jsonl")
    digits = {row["audio_filepath"]: samples(row) for row in digit_rows}
    index = defaultdict(list)
    for name, wave in digits.items():
        middle = len(wave) // 2
        index[wave[middle : middle + KEY_SAMPLES].tobytes()].append((name, middle))
    speakers = sorted({row["speaker"] for row in digit_rows})
    if left_out is not None and left_out not in speakers:
        sys.exit(f"--leave-out {left_out}: no such speaker; there are {', '.join(speakers)}")
    gone = [row for row in digit_rows if row["speaker"] == left_out]
    known = [row for row in digit_rows if row["speaker"] != left_out]
    held = [r for r in known if Path(r["audio_filepath"]).stem.split("_")[-1] in HELD_OUT]
    held_names = {row["audio_filepath"] for row in held}
    train = [row for row in known if row["audio_filepath"] not in held_names]
    strings = [row for row in string_rows if row["speaker"] != left_out]
    strings = [r for r in strings if not recordings_in(samples(r), index, digits) & held_names]
    made = make_strings(train, TRAINING_STRINGS, out / "train", seed=1)
    manifests = {
        "train": [*train, *strings, *made],
        "held_out_digits": held,
        "held_out_strings": make_strings(held, HELD_OUT_STRINGS, out / "held_out", seed=0),
        "overfit_64": string_rows[:64],
    }
    if gone:
        manifests["left_out_digits"] = gone
        manifests["left_out_strings"] = make_strings(
            gone, HELD_OUT_STRINGS, out / "left_out", seed=2
        )
    for name, rows in manifests.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--leave-out", metavar="SPEAKER")
    arguments = parser.parse_args()
    main(arguments.source.resolve(), arguments.out.resolve(), arguments.leave_out)
