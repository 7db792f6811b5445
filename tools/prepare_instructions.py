"""Makes the data of the recipe instructions: one recording, four instructions.

    python tools/prepare_instructions.py OUT_FOLDER [--train 1500] [--test 150]

Draws sentences of slots and reads them in espeak-ng's voices; every third one of the test in a
voice that training does not have. Each recording has four rows: transcribe it, spell a word of it,
reply to a question about it, say it as a question. Writes train.jsonl, validation.jsonl (3 % of
training), test.jsonl (other sentences, wordings of training) and test_wordings.jsonl (the
same recordings in wordings that training does not have), all of conversations; and corpus.jsonl:
the bundled training recordings, to be transcribed and to spell a word of. Stopped, it continues
with the recordings that are not there.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import soundfile
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent / "corpus"))
from instructions import Sentence, draw_sentences, of_sentence, of_text
from synthesis import PRETRAINING_VOICES, RATE_HZ, TEST_VOICES, Condition, Utterance, synthesize

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
SEED = 0
ROOM_SHARE, NOISE_SHARE = 0.25, 0.25
UNSEEN_VOICE_EVERY = 3
VALIDATION_SHARE = 0.03


def plan(sentences: Sequence[Sentence], *, is_test: bool) -> list[Utterance]:
    """How each sentence is read: voice, speed, pitch, room and noise drawn at random."""
    rng = np.random.default_rng([SEED, is_test])
    utterances = []
    for number, sentence in enumerate(sentences):
        is_unseen = is_test and number % UNSEEN_VOICE_EVERY == 0
        voices = TEST_VOICES if is_unseen else PRETRAINING_VOICES
        is_noisy = rng.random() < NOISE_SHARE
        condition = Condition(
            noise=str(rng.choice(["white", "pink", "babble"])) if is_noisy else "",
            snr_db=float(rng.uniform(12, 30)) if is_noisy else 0.0,
            rt60_s=float(rng.uniform(0.1, 0.5)) * (rng.random() < ROOM_SHARE),
        )
        utterances.append(
            Utterance(
                text=sentence.text,
                voice=voices[rng.integers(len(voices))],
                speed_wpm=int(rng.integers(120, 190)),
                pitch=int(rng.integers(30, 76)),
                condition=condition,
                seed=int(rng.integers(2**31)),
            )
        )
    return utterances


def write_recording(job: tuple[Utterance, Path]) -> float:
    """Writes a recording, unless it is there, and returns its seconds."""
    utterance, path = job
    if not path.exists():
        unfinished = path.with_suffix(".part")
        soundfile.write(unfinished, synthesize(utterance), RATE_HZ, "PCM_16", format="FLAC")
        os.replace(unfinished, path)
    return round(soundfile.info(path).duration, 4)


def record(utterances: Sequence[Utterance], folder: Path) -> list[tuple[Path, float]]:
    """The recording of each utterance, and its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.flac" for i in range(len(utterances))]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(write_recording, zip(utterances, paths, strict=True), chunksize=16)
        return list(zip(paths, tqdm(done, total=len(paths), desc=folder.name), strict=True))


def rows_of(
    recording: tuple[Path, float], instructions: Iterable[tuple[str, str, str]]
) -> list[dict]:
    """A conversation for each instruction about a recording."""
    path, duration_s = recording
    return [
        {
            "id": f"{path.parent.name}_{path.stem}_{kind}",
            "conversations": [
                {"from": "User", "type": "text", "value": instruction},
                {"from": "User", "type": "audio", "value": str(path), "duration": duration_s},
                {"from": "Assistant", "type": "text", "value": response},
            ],
        }
        for kind, instruction, response in instructions
    ]


def sentence_rows(
    sentences: Sequence[Sentence],
    recordings: Sequence[tuple[Path, float]],
    *,
    is_unseen: bool = False,
) -> list[dict]:
    """The rows of sentences and their recordings."""
    rng = np.random.default_rng([SEED, 2, is_unseen])
    pairs = zip(sentences, recordings, strict=True)
    return [
        row
        for sentence, recording in pairs
        for row in rows_of(recording, of_sentence(sentence, rng, is_unseen=is_unseen))
    ]


def corpus_rows() -> list[dict]:
    """The rows of the bundled training recordings."""
    rng = np.random.default_rng([SEED, 3])
    lines = (CORPUS / "train.jsonl").read_text().splitlines()
    return [
        row
        for read in map(json.loads, lines)
        for row in rows_of(
            (CORPUS / read["audio_filepath"], read["duration"]), of_text(read["text"], rng)
        )
    ]


def write_manifest(path: Path, rows: list[dict]) -> None:
    """Writes a JSON-lines manifest and tells how much is in it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {
        row["conversations"][1]["value"]: row["conversations"][1]["duration"] for row in rows
    }
    minutes = sum(seconds.values()) / 60
    print(f"{path.name}: {len(rows)} rows, {len(seconds)} recordings, {minutes:.1f} minutes")


def main(out: Path, train: int, test: int) -> None:
    """Writes recordings and manifests; no sentence is in two of them."""
    validation = max(round(VALIDATION_SHARE * train), 1)
    sentences = draw_sentences(train + validation + test, np.random.default_rng(SEED))
    sets = {
        "train": sentences[:train],
        "validation": sentences[train : train + validation],
        "test": sentences[train + validation :],
    }
    for name, own in sets.items():
        recordings = record(plan(own, is_test=name == "test"), out / name)
        write_manifest(out / f"{name}.jsonl", sentence_rows(own, recordings))
        if name == "test":
            unseen = sentence_rows(own, recordings, is_unseen=True)
            write_manifest(out / "test_wordings.jsonl", unseen)
    write_manifest(out / "corpus.jsonl", corpus_rows())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=1500, metavar="N")
    parser.add_argument("--test", type=int, default=150, metavar="N")
    arguments = parser.parse_args()
    main(arguments.out.resolve(), arguments.train, arguments.test)
