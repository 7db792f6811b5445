"""Makes the manifests of the recipe barista: orders of coffee, and their meaning as JSON.

    python tools/prepare_barista.py OUT_FOLDER [FOLDER] [--synthetic 3000]

FOLDER is a clone of github.com/Picovoice/speech-to-intent-benchmark (Apache-2.0), or a folder with
train.jsonl (whose `text` is the JSON), kitchen_noise.flac and corpus.txt. Without it, git clones
the repository into OUT_FOLDER/archive. Which set a recording is in follows from the first eight
characters of its name. Writes train.jsonl, validation.jsonl, test_seen.jsonl and test_unseen.jsonl
(whether the whole label occurs in training), train_trimmed.jsonl (the training recordings without
most of the silence around the order), noise_train.flac (80 s of the kitchen), noise.jsonl (that it
is there) and noise_test.flac (the rest). With --synthetic N, also synthetic.jsonl: N orders like
those of corpus.txt in espeak-ng's voices, none with a label of validation or test that training
does not have. Stopped, it continues with the orders that are not there.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import argparse
import hashlib
import json
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import soundfile
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent / "corpus"))
from orders import parse_order, vary_order
from synthesis import PRETRAINING_VOICES, RATE_HZ, Condition, Utterance, synthesize

from speechlm2_jax.inference.timestamps.speech import find_silences

ARCHIVE = "https://github.com/Picovoice/speech-to-intent-benchmark"
TEST_SHARE, VALIDATION_SHARE = 0.23, 0.06
TRAINING_NOISE_S = 80.0
MARGIN_S = (0.2, 0.6)
"""Silence that trimming leaves before and behind an order, at most."""


def canonical(label: dict[str, str]) -> str:
    """A label as the text to generate: one short form, keys sorted."""
    return json.dumps(dict(sorted(label.items())), separators=(",", ":"))


def read_rows(folder: Path) -> list[dict]:
    """A row for every recording. Raises ValueError for a folder of no known form."""
    if (folder / "data/label/label.json").exists():
        labels = json.loads((folder / "data/label/label.json").read_text())
        speech = sorted((folder / "data/speech/clean").glob("*.wav"))
        found = [
            (path, {"intent": labels[path.name]["intent"], **labels[path.name]["slots"]})
            for path in speech
        ]
    elif (folder / "train.jsonl").exists():
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        found = [(folder / row["audio_filepath"], json.loads(row["text"])) for row in rows]
    else:
        raise ValueError(f"{folder} has neither data/label/label.json nor train.jsonl")
    return [
        {
            "audio_filepath": str(path),
            "duration": round(soundfile.info(path).duration, 4),
            "text": canonical({key: value.strip() for key, value in label.items()}),
        }
        for path, label in found
    ]


def set_of(row: dict) -> str:
    """The set of a recording, by the first eight characters of its name."""
    name = Path(row["audio_filepath"]).name[:8]
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def split(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of each set; those of the test by whether training has their label."""
    sets: dict[str, list[dict]] = {
        "train": [],
        "validation": [],
        "test_seen": [],
        "test_unseen": [],
    }
    known = {row["text"] for row in rows if set_of(row) == "train"}
    for row in rows:
        seen = {True: "_seen", False: "_unseen"}[row["text"] in known]
        name = set_of(row)
        sets[name + seen if name == "test" else name].append(row)
    return sets


def trimmed(row: dict) -> dict:
    """The row of the stretch from just before an order to just behind it."""
    wave, rate_hz = soundfile.read(row["audio_filepath"], dtype="float32")
    silences = find_silences(wave, rate_hz)
    start = max(silences[0].end - MARGIN_S[0], 0.0)
    end = min(silences[-1].start + MARGIN_S[1], row["duration"])
    return {**row, "offset": round(start, 3), "duration": round(end - start, 3)}


def write_noise(folder: Path, out: Path) -> None:
    """Divides the recording of a kitchen into one for training and one for tests."""
    candidates = (folder / "data/noise/kitchen.wav", folder / "kitchen_noise.flac")
    path = next(path for path in candidates if path.exists())
    wave, rate_hz = soundfile.read(path, dtype="int16")
    cut = int(TRAINING_NOISE_S * rate_hz)
    soundfile.write(out / "noise_train.flac", wave[:cut], rate_hz)
    soundfile.write(out / "noise_test.flac", wave[cut:], rate_hz)
    row = {"audio_filepath": "noise_train.flac", "duration": len(wave[:cut]) / rate_hz, "text": ""}
    write_manifest(out / "noise.jsonl", [row])


def plan_orders(sentences: list[str], count: int, left_out: set[str]) -> list[Utterance]:
    """Varied orders, without labels of `left_out`; voices and reverberation drawn at random."""
    rng = np.random.default_rng(0)
    utterances: list[Utterance] = []
    while len(utterances) < count:
        sentence = vary_order(str(rng.choice(sentences)), rng)
        if canonical(parse_order(sentence)) in left_out:
            continue
        utterances.append(
            Utterance(
                text=sentence,
                voice=PRETRAINING_VOICES[rng.integers(len(PRETRAINING_VOICES))],
                speed_wpm=int(rng.integers(120, 200)),
                pitch=int(rng.integers(30, 76)),
                condition=Condition(rt60_s=float(rng.uniform(0.1, 0.5)) * (rng.random() < 0.5)),
                seed=len(utterances),
            )
        )
    return utterances


def write_order(job: tuple[Utterance, Path]) -> dict:
    """Writes an order with silence around it, unless it is there, and returns its row."""
    utterance, path = job
    if not path.exists():
        rng = np.random.default_rng(utterance.seed)
        before, behind = (rng.uniform(0, (0.6, 1.2)) * RATE_HZ).astype(int)
        wave = np.pad(synthesize(utterance), (before, behind))
        unfinished = path.with_suffix(".part")
        soundfile.write(unfinished, wave, RATE_HZ, "PCM_16", format="FLAC")
        os.replace(unfinished, path)
    return {
        "audio_filepath": f"{path.parent.name}/{path.name}",
        "duration": round(soundfile.info(path).duration, 4),
        "text": canonical(parse_order(utterance.text)),
    }


def write_synthetic(sentences: list[str], count: int, left_out: set[str], out: Path) -> None:
    """Writes synthetic.jsonl and its recordings."""
    folder = out / "synthetic"
    folder.mkdir(exist_ok=True)
    planned = plan_orders(sentences, count, left_out)
    jobs = [(utterance, folder / f"{i:05d}.flac") for i, utterance in enumerate(planned)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(write_order, jobs, chunksize=16), total=count))
    write_manifest(out / "synthetic.jsonl", rows)


def write_manifest(path: Path, rows: list[dict]) -> None:
    """Writes a JSON-lines manifest and tells how much is in it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    minutes = sum(row["duration"] for row in rows) / 60
    print(f"{path.name}: {len(rows)} recordings, {minutes:.1f} minutes")


def main(out: Path, folder: Path | None, synthetic: int) -> None:
    """Writes the manifests, noises and synthetic orders."""
    out.mkdir(parents=True, exist_ok=True)
    if folder is None:
        folder = out / "archive"
        if not folder.exists():
            subprocess.run(["git", "clone", "--depth", "1", ARCHIVE, str(folder)], check=True)
    sets = split(read_rows(folder))
    for name, rows in sets.items():
        write_manifest(out / f"{name}.jsonl", rows)
    write_manifest(out / "train_trimmed.jsonl", [trimmed(row) for row in sets["train"]])
    write_noise(folder, out)
    if synthetic:
        corpora = (folder / "data/watson/corpus.txt", folder / "corpus.txt")
        corpus = next(path for path in corpora if path.exists())
        sentences = [line.strip() for line in corpus.read_text().splitlines() if line.strip()]
        held_back = {row["text"] for name in sets if name != "train" for row in sets[name]}
        left_out = held_back - {row["text"] for row in sets["train"]}
        write_synthetic(sentences, synthetic, left_out, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    source = arguments.folder.resolve() if arguments.folder else None
    main(arguments.out.resolve(), source, arguments.synthetic)
