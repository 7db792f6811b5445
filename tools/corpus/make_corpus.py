"""Makes the bundled corpus: `python tools/corpus/make_corpus.py` writes corpus/ anew.

Needs espeak-ng; takes a few minutes. All choices follow from SEED, so the same programs give the
same bytes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import soundfile
from ogg import write_opus
from synthesis import (
    RATE_HZ,
    TEST_VOICES,
    VOICES,
    Condition,
    Utterance,
    Voice,
    espeak_version,
    synthesize,
)
from texts import training_texts
from tqdm import tqdm

HERE = Path(__file__).parent
CORPUS = HERE.parents[1] / "corpus"
SEED = 3
SECOND_READINGS = 275  # training sentences spoken again, by another voice as a rule
UNSEEN_SHARE = 0.3  # of the test's rows
OPUS_LEVEL = 0.98  # about 14 kbit/s, the least at which Opus keeps the band above 4 kHz
SECONDS = (1.5, 5.95)
SPEED_STEP_WPM, SPEEDS_WPM = 10, (80, 240)
PROCESSES = 2
VALIDATION_ROWS = 80  # taken out of training, their sentences with them


def plan_training(rng: np.random.Generator) -> list[Utterance]:
    """Returns every training sentence once and some again, the voices taking turns."""
    texts = training_texts()
    texts += [texts[i] for i in rng.permutation(len(texts))[:SECOND_READINGS]]
    return _plan(texts, [VOICES[i % len(VOICES)] for i in range(len(texts))], rng)


def plan_test(rng: np.random.Generator) -> list[Utterance]:
    """Returns every test sentence once, three in ten spoken by the two unseen voices."""
    texts = (HERE / "test_sentences.txt").read_text().splitlines()
    unseen = round(len(texts) * UNSEEN_SHARE)
    voices = [TEST_VOICES[i % len(TEST_VOICES)] for i in range(unseen)]
    voices += [VOICES[i % len(VOICES)] for i in range(len(texts) - unseen)]
    return _plan(texts, voices, rng)


def _plan(
    texts: Sequence[str], voices: Sequence[Voice], rng: np.random.Generator
) -> list[Utterance]:
    order = rng.permutation(len(voices))
    return [
        Utterance(
            text=text,
            voice=voices[i],
            speed_wpm=int(rng.integers(115, 181)),
            pitch=int(rng.integers(35, 66)),
            gain_db=round(float(rng.uniform(-8, 3)), 1),
            condition=_plan_condition(rng),
            seed=int(rng.integers(2**31)),
        )
        for text, i in zip(texts, order, strict=True)
    ]


def _plan_condition(rng: np.random.Generator) -> Condition:
    """Returns a quiet dry place in seven of ten cases, else noise, a room or both."""
    kind = rng.choice(["clean", "noise", "room", "both"], p=[0.7, 0.13, 0.1, 0.07])
    noisy, roomy = kind in ("noise", "both"), kind in ("room", "both")
    return Condition(
        noise=str(rng.choice(["white", "pink", "hum", "babble"])) if noisy else "",
        snr_db=float(rng.integers(12, 31)) if noisy else 0.0,
        rt60_s=round(float(rng.uniform(0.15, 0.5)), 2) if roomy else 0.0,
    )


def fit_speed(utterance: Utterance) -> tuple[Utterance, np.ndarray]:
    """Returns the utterance and its samples [S], its speed changed until SECONDS are kept.

    Raises ValueError for a sentence that no speed makes fit.
    """
    while SPEEDS_WPM[0] <= utterance.speed_wpm <= SPEEDS_WPM[1]:
        wave = synthesize(utterance)
        seconds = wave.size / RATE_HZ
        if SECONDS[0] <= seconds <= SECONDS[1]:
            return utterance, wave
        step = SPEED_STEP_WPM if seconds > SECONDS[1] else -SPEED_STEP_WPM
        utterance = replace(utterance, speed_wpm=utterance.speed_wpm + step)
    raise ValueError(f"{utterance.text!r} does not fit into {SECONDS} s; make it longer or shorter")


def write_utterance(job: tuple[Utterance, Path]) -> dict:
    """Writes one file and returns its row of the manifest."""
    planned, path = job
    utterance, wave = fit_speed(planned)
    write_opus(path, wave, RATE_HZ, OPUS_LEVEL)
    return {
        "audio_filepath": path.relative_to(CORPUS).as_posix(),
        "duration": round(soundfile.info(path).duration, 4),
        "text": utterance.text,
        "voice": utterance.voice.name,
        "speed": utterance.speed_wpm,
        "pitch": utterance.pitch,
        "condition": str(utterance.condition),
    }


def write_split(name: str, planned: list[Utterance]) -> list[dict]:
    """Writes the files of one part, numbered in its order; returns their rows."""
    folder = CORPUS / "audio" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    jobs = [(utterance, folder / f"{i:04d}.ogg") for i, utterance in enumerate(planned)]
    with ProcessPoolExecutor(PROCESSES) as pool:
        done = pool.map(write_utterance, jobs, chunksize=8)
        rows = list(tqdm(done, total=len(jobs), desc=name, unit="utterance"))
    return rows


def take_validation(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Parts training rows from those to validate on, evenly among sentences spoken once."""
    times = Counter(row["text"] for row in rows)
    once = [row for row in rows if times[row["text"]] == 1]
    chosen = [once[i] for i in np.linspace(0, len(once) - 1, VALIDATION_ROWS).astype(int)]
    taken = {row["text"] for row in chosen}
    return [row for row in rows if row["text"] not in taken], chosen


def write_manifest(name: str, rows: list[dict]) -> None:
    """Writes one JSON object a line."""
    (CORPUS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{name}: {len(rows)} utterances, {sum(row['duration'] for row in rows):.0f} s")


def main() -> None:
    """Writes corpus/ and prints its size."""
    spoken = {
        name: write_split(name, plan(np.random.default_rng((SEED, number))))
        for number, (name, plan) in enumerate((("train", plan_training), ("test", plan_test)))
    }
    train, validation = take_validation(spoken["train"])
    for name, rows in (("train", train), ("validation", validation), ("test", spoken["test"])):
        write_manifest(name, rows)
    size = sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file())
    print(f"{CORPUS.name}/: {size / 1e6:.2f} MB, {espeak_version()}")


if __name__ == "__main__":
    main()
