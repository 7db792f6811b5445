"""Makes the encoder's training speech in natural voices, which is too big to commit.

    python tools/corpus/make_natural_speech.py OUT --utterances 20000

writes OUT/audio/*.flac (16 bit, 16 kHz, mono), OUT/train.jsonl and OUT/val.jsonl (300 rows), and
OUT/texts.jsonl.xz, the texts and voices. After a stop the same command resumes. tools/corpus/
natural_voices.py lists the voices, their licences and how to install them; one utterance in four is
espeak-ng's. Half of the texts are of a wide vocabulary (tools/corpus/open_texts.py), the others the
bundled corpus's training sentences, phrases of them and strings of digits.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import argparse
import io
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import natural_voices
import numpy as np
import open_texts
import soundfile
from make_pretraining_speech import claim_folder, plan_condition, write_said
from synthesis import PRETRAINING_VOICES, RATE_HZ, Utterance, Voice, espeak, record
from texts import digit_text, glued_text, training_texts
from tqdm import tqdm

SEED = 23
VALIDATION_ROWS = 300
ESPEAK_SHARE = 0.25
TEXT_SHARES = {"dictionary": 0.4, "novel": 0.2, "sentence": 0.1, "glued": 0.2, "digits": 0.1}
LONGEST_S = 7.0
FORMATS = {  # codecs: rate in Hz, libsndfile's format and subtype
    "gsm": (8_000, "WAV", "GSM610"),
    "ulaw": (8_000, "WAV", "ULAW"),
    "mp3": (16_000, "MP3", "MPEG_LAYER_III"),
}


@dataclass(frozen=True, kw_only=True)
class NaturalUtterance:
    """What to make: the text with its condition, how fast, how large a speaker, which codec.

    `voice` indexes natural_voices.VOICES; -1 is espeak-ng with `recording.voice`.
    """

    recording: Utterance
    voice: int
    speed: float
    size: float
    codec: str

    @property
    def voice_label(self) -> str:
        """The voice in the manifest."""
        at = self.voice
        return self.recording.voice.name if at < 0 else natural_voices.VOICES[at].label


def plan_utterances(count: int) -> list[NaturalUtterance]:
    """Returns what to make, all from one seed. Raises what `open_texts` raises."""
    rng = np.random.default_rng(SEED)
    shares = np.array([voice.share for voice in natural_voices.VOICES])
    return [_plan(index, text, shares, rng) for index, text in enumerate(_plan_texts(count, rng))]


def _plan_texts(count: int, rng: np.random.Generator) -> list[str]:
    sentences = training_texts()
    sources = {
        "dictionary": open_texts.shuffled(open_texts.dictionary_texts(), rng),
        "novel": open_texts.shuffled(open_texts.novel_texts(), rng),
        "sentence": open_texts.shuffled(sentences, rng),
        "glued": iter(lambda: glued_text(sentences, rng), None),
        "digits": iter(lambda: digit_text(rng), None),
    }
    kinds = rng.choice(list(TEXT_SHARES), count, p=list(TEXT_SHARES.values()))
    return [next(sources[kind]) for kind in kinds]


def _plan(index: int, text: str, shares: np.ndarray, rng: np.random.Generator) -> NaturalUtterance:
    natural = rng.random() >= ESPEAK_SHARE
    at = int(rng.choice(len(shares), p=shares / shares.sum())) if natural else -1
    label = natural_voices.VOICES[at].label if natural else ""
    robot = PRETRAINING_VOICES[int(rng.integers(len(PRETRAINING_VOICES)))]
    return NaturalUtterance(
        recording=Utterance(
            text=text,
            voice=Voice(name=label, spec="") if natural else robot,
            speed_wpm=int(rng.integers(110, 216)),
            pitch=int(rng.integers(30, 76)),
            gain_db=round(float(rng.uniform(-15, 4)), 1),
            condition=plan_condition(rng),
            seed=index,
        ),
        voice=at,
        speed=round(float(rng.uniform(0.85, 1.2)), 2),
        # a third as the voice is, the others a speaker of another size
        size=1.0 if rng.random() < 1 / 3 else round(float(rng.uniform(0.86, 1.14)), 3),
        codec=str(rng.choice(["", *FORMATS], p=[0.82, 0.06, 0.06, 0.06])),
    )


def synthesize(utterance: NaturalUtterance) -> np.ndarray:
    """Returns float32 samples [S] at 16 kHz. Raises RuntimeError as the engines do."""
    recording = utterance.recording
    if utterance.voice < 0:
        voice = recording.voice.spec
        speech = espeak(recording.text, voice, recording.speed_wpm, recording.pitch)
    else:
        voice = natural_voices.VOICES[utterance.voice]
        speech = natural_voices.synthesize(
            recording.text, voice, speed=utterance.speed, size=utterance.size
        )
    return through_codec(record(speech, recording)[0], utterance.codec)


def through_codec(wave: np.ndarray, codec: str) -> np.ndarray:
    """Returns 16 kHz samples [S] as they come back from a codec of FORMATS; "" is none."""
    if not codec:
        return wave
    rate_hz, container, subtype = FORMATS[codec]
    file = io.BytesIO()
    soundfile.write(
        file, natural_voices.resample(wave, RATE_HZ, rate_hz), rate_hz, subtype, format=container
    )
    file.seek(0)
    back = natural_voices.resample(soundfile.read(file, dtype="float32")[0], rate_hz, RATE_HZ)
    return np.resize(np.pad(back, (0, max(0, wave.size - back.size))), wave.size)


def write_utterance(job: tuple[NaturalUtterance, Path]) -> float:
    """Writes one FLAC file unless it is there; returns its seconds."""
    utterance, path = job
    if not path.exists():
        unfinished = path.with_suffix(".part")
        wave = synthesize(utterance)
        soundfile.write(unfinished, wave, RATE_HZ, "PCM_16", format="FLAC")
        os.replace(unfinished, path)
    return soundfile.info(path).duration


def _row(utterance: NaturalUtterance, path: Path, duration_s: float) -> dict:
    return {
        "audio_filepath": f"audio/{path.name}",
        "duration": round(duration_s, 4),
        "text": utterance.recording.text,
        "voice": utterance.voice_label,
        "condition": f"{utterance.recording.condition}+{utterance.codec}".strip("+"),
    }


def main() -> None:
    """Makes the folder and the list of what was said."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--utterances", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    planned = plan_utterances(arguments.utterances)
    claim_folder(arguments.out, planned)
    paths = [arguments.out / "audio" / f"{index:06d}.flac" for index in range(len(planned))]
    with ProcessPoolExecutor(arguments.processes) as pool:
        written = pool.map(write_utterance, zip(planned, paths, strict=True), chunksize=16)
        seconds = list(tqdm(written, total=len(planned), unit="utterance"))
    rows = [_row(*one) for one in zip(planned, paths, seconds, strict=True)]
    kept = [row for row in rows if row["duration"] <= LONGEST_S]
    for name, part in (("val", kept[:VALIDATION_ROWS]), ("train", kept[VALIDATION_ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (arguments.out / f"{name}.jsonl").write_text(text)
    write_said(kept, arguments.out / "texts.jsonl.xz")
    hours = sum(row["duration"] for row in kept) / 3600
    print(
        f"{arguments.out}: {len(kept)} utterances, {hours:.1f} hours; "
        f"{len(rows) - len(kept)} over {LONGEST_S:g} s left out"
    )


if __name__ == "__main__":
    main()
