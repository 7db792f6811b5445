"""Makes the larger training speech of the encoder, which is too big to commit.

    python tools/corpus/make_pretraining_speech.py OUT --texts mixed --utterances 16000

writes OUT/audio/*.flac (16 bit, 16 kHz, mono), OUT/train.jsonl and OUT/val.jsonl (200 rows), whose
rows also say when each phoneme begins (`phonemes`: seconds and espeak-ng's name), and the list of
what was said by whom, tools/corpus/pretraining_TEXTS.jsonl.xz, which is committed so that a test
can look for sentences and voices of the test in it. Stopped, it goes on where it was. `mixed` texts
are mostly English, `glued` ones half phrases in no order, `phrases` nothing else but digits.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import argparse
import hashlib
import json
import lzma
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import soundfile
from synthesis import PRETRAINING_VOICES, RATE_HZ, Condition, Utterance, synthesize_timed
from texts import digit_text, glued_text, training_texts, walked_texts
from tqdm import tqdm

HERE = Path(__file__).parent
SEEDS = {"mixed": 2, "glued": 4, "phrases": 6}
SPEEDS_WPM = {"mixed": (100, 196), "glued": (100, 196), "phrases": (110, 216)}
VALIDATION_ROWS = 200
SHARES = {  # of sentences, walks and glued phrases; the rest are strings of digits
    "mixed": (0.45, 0.35, 0.0),
    "glued": (0.2, 0.15, 0.5),
    "phrases": (0.0, 0.0, 0.9),
}


def plan_utterances(count: int, kind: str) -> list[Utterance]:
    """Returns what to say: texts, voices and conditions drawn evenly, all from the kind's seed."""
    rng = np.random.default_rng(SEEDS[kind])
    texts = _plan_texts(count, SHARES[kind], rng)
    # every voice about as often as every other, in a random order
    voices = np.concatenate(
        [
            rng.permutation(len(PRETRAINING_VOICES))
            for _ in range(-(-count // len(PRETRAINING_VOICES)))
        ]
    )
    return [
        Utterance(
            text=text,
            voice=PRETRAINING_VOICES[voice],
            speed_wpm=int(rng.integers(*SPEEDS_WPM[kind])),
            pitch=int(rng.integers(30, 76)),
            gain_db=round(float(rng.uniform(-12, 4)), 1),
            condition=plan_condition(rng),
            seed=index,
        )
        for index, (text, voice) in enumerate(zip(texts, voices, strict=False))
    ]


def _plan_texts(
    count: int, shares: tuple[float, float, float], rng: np.random.Generator
) -> list[str]:
    sentences, walks, glued = (round(count * share) for share in shares)
    spoken = training_texts()
    texts = [
        *_cycled(spoken, sentences, rng),
        *_cycled(walked_texts(), walks, rng),
        *(glued_text(spoken, rng) for _ in range(glued)),
    ]
    texts += [digit_text(rng) for _ in range(count - len(texts))]
    return [texts[i] for i in rng.permutation(count)]


def _cycled(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Returns `count` texts, each about equally often."""
    rounds = [rng.permutation(len(texts)) for _ in range(count // len(texts) + 1)]
    return [texts[i] for i in np.concatenate(rounds)[:count]]


def plan_condition(rng: np.random.Generator) -> Condition:
    """Draws noise, room, band and codec of a recording."""
    noise = str(rng.choice(["", "white", "pink", "hum", "babble"], p=[0.5, 0.12, 0.15, 0.08, 0.15]))
    return Condition(
        noise=noise,
        snr_db=round(float(rng.uniform(8, 30))) if noise else 0.0,
        rt60_s=round(float(rng.uniform(0.15, 0.5)), 2) if rng.random() < 0.35 else 0.0,
        band=str(rng.choice(["", "telephone", "narrow"], p=[0.7, 0.2, 0.1])),
        # the bundled corpus is Opus: the encoder should know its sound
        opus_level=round(float(rng.uniform(0.95, 0.985)), 3) if rng.random() < 0.5 else 0.0,
    )


def claim_folder(out: Path, planned: Sequence[object]) -> None:
    """Notes the plan in the folder. Raises ValueError if files of another plan lie there."""
    digest = hashlib.sha256(repr(planned).encode()).hexdigest()
    note = out / "plan.sha256"
    if note.exists() and note.read_text() != digest:
        raise ValueError(f"{out} holds utterances of another plan; delete it or name another")
    (out / "audio").mkdir(parents=True, exist_ok=True)
    note.write_text(digest)


def write_utterance(job: tuple[Utterance, Path]) -> tuple[float, list]:
    """Writes one FLAC file and its times unless they are there; returns seconds and phonemes."""
    utterance, path = job
    times = path.with_suffix(".json")
    if not times.exists():
        wave, phonemes = synthesize_timed(utterance)
        soundfile.write(path, wave, RATE_HZ, "PCM_16", format="FLAC")
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps([len(wave) / RATE_HZ, phonemes]))
        os.replace(unfinished, times)
    return tuple(json.loads(times.read_text()))


def _row(utterance: Utterance, path: Path, duration_s: float, phonemes: list) -> dict:
    return {
        "audio_filepath": f"audio/{path.name}",
        "duration": round(duration_s, 4),
        "text": utterance.text,
        "voice": utterance.voice.name,
        "speed": utterance.speed_wpm,
        "pitch": utterance.pitch,
        "condition": str(utterance.condition),
        "phonemes": phonemes,
    }


def write_said(rows: list[dict], path: Path) -> None:
    """Writes text and voice of every row, in xz, the same bytes for the same rows."""
    lines = [json.dumps({"text": row["text"], "voice": row["voice"]}) + "\n" for row in rows]
    path.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Makes the folder and the list of what was said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--utterances", type=int, default=16_000)
    parser.add_argument("--texts", choices=sorted(SEEDS), default="mixed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-list", action="store_true", help="leave the committed list alone")
    arguments = parser.parse_args()
    planned = plan_utterances(arguments.utterances, arguments.texts)
    claim_folder(arguments.out, planned)
    paths = [arguments.out / "audio" / f"{index:06d}.flac" for index in range(len(planned))]
    with ProcessPoolExecutor(arguments.processes) as pool:
        written = pool.map(write_utterance, zip(planned, paths, strict=True), chunksize=16)
        spoken = list(tqdm(written, total=len(planned), unit="utterance"))
    rows = [_row(u, path, *said) for u, path, said in zip(planned, paths, spoken, strict=True)]
    for name, part in (("val", rows[:VALIDATION_ROWS]), ("train", rows[VALIDATION_ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (arguments.out / f"{name}.jsonl").write_text(text)
    if not arguments.no_list:
        write_said(rows, HERE / f"pretraining_{arguments.texts}.jsonl.xz")
    hours = sum(row["duration"] for row in rows) / 3600
    print(f"{arguments.out}: {len(rows)} utterances, {hours:.1f} hours")


if __name__ == "__main__":
    main()
