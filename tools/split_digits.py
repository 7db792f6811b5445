"""Splits a folder of spoken digits by recording.

    python tools/split_digits.py FSDD_FOLDER OUT_FOLDER

The folder holds `train_digits.jsonl` (single recordings) and `train_strings.jsonl` (recordings
joined with silence). A string is found to contain a recording by its exact samples. Recordings
05 to 09 of every digit and speaker are held out: a string that contains one leaves the training
set, and new strings are joined from held-out recordings alone. Writes train.jsonl,
held_out.jsonl, overfit_64.jsonl and the new strings' audio.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile

HELD_OUT = {"05", "06", "07", "08", "09"}
HELD_OUT_STRINGS = 60
KEY_SAMPLES = 16


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


def join(parts: list[np.ndarray], rng: np.random.Generator, rate_hz: int) -> np.ndarray:
    """Joins recordings with 30 to 250 ms of silence."""
    pieces = [parts[0]]
    for part in parts[1:]:
        pieces += [np.zeros(int(rng.uniform(0.03, 0.25) * rate_hz), np.int16), part]
    return np.concatenate(pieces)


def new_strings(rows: list[dict], out: Path) -> list[dict]:
    """Joins 2 to 7 held-out recordings of one speaker into each new string."""
    rng = np.random.default_rng(0)
    by_speaker = defaultdict(list)
    for row in rows:
        by_speaker[row["speaker"]].append(row)
    strings = []
    for i in range(HELD_OUT_STRINGS):
        speaker = sorted(by_speaker)[i % len(by_speaker)]
        chosen = rng.choice(len(by_speaker[speaker]), rng.integers(2, 8), replace=False)
        parts = [by_speaker[speaker][c] for c in chosen]
        wave = join([samples(p) for p in parts], rng, 8000)
        path = out / f"held_out_{i:03d}.wav"
        soundfile.write(path, wave, 8000)
        text = " ".join(p["text"] for p in parts)
        strings.append(
            {
                "audio_filepath": str(path),
                "duration": len(wave) / 8000,
                "text": text,
                "speaker": speaker,
            }
        )
    return strings


def main(source: Path, out: Path) -> None:
    """Writes the three manifests."""
    out.mkdir(parents=True, exist_ok=True)
    digit_rows = read_manifest(source / "train_digits.jsonl")
    string_rows = read_manifest(source / "train_strings.jsonl")
    digits = {row["audio_filepath"]: samples(row) for row in digit_rows}
    index = defaultdict(list)
    for name, wave in digits.items():
        middle = len(wave) // 2
        index[wave[middle : middle + KEY_SAMPLES].tobytes()].append((name, middle))
    held = [r for r in digit_rows if Path(r["audio_filepath"]).stem.split("_")[-1] in HELD_OUT]
    held_names = {row["audio_filepath"] for row in held}
    train = [r for r in digit_rows if r["audio_filepath"] not in held_names]
    train += [r for r in string_rows if not recordings_in(samples(r), index, digits) & held_names]
    manifests = {
        "train": train,
        "held_out": held + new_strings(held, out),
        "overfit_64": string_rows[:64],
    }
    for name, rows in manifests.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/split_digits.py FSDD_FOLDER OUT_FOLDER")
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
