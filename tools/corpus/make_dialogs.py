"""Makes corpus/dialogs: a user says a sentence of the bundled corpus, an agent answers it aloud.

    python tools/corpus/make_dialogs.py

What the agent says follows from one word of the user's sentence (ANSWERS), in one voice, after a
pause; each voice has a recording of its own of the whole dialog. `train.jsonl` and
`validation.jsonl` are Lhotse cuts whose `target_audio` is the agent's recording, paths relative to
them. No sentence and no recording is in both, and none of the test set is in either. Needs
espeak-ng (tried with 1.51) and lhotse; the same programs give the same bytes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import json
import shutil
from typing import Any

import numpy as np
import soundfile
from ogg import write_opus
from synthesis import RATE_HZ, Utterance, make_voice, synthesize

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "corpus"
DIALOGS = CORPUS / "dialogs"
OPUS_LEVEL = 0.98
AGENT = make_voice("en-us", "f1")
SPEED_WPM, PITCH = 165, 50
FRAME = 1280
"""Samples of a frame of 80 ms: answers begin at one, so that equal words give equal codes."""
PAUSE_FRAMES, REST_FRAMES = 4, 6
"""Between the two voices at least, and after them."""
PER_WORD = {"validation": 2, "train": 13}
ANSWERS = {
    "bus": "the bus comes at nine",
    "dog": "the dog is asleep",
    "water": "the water is fresh",
    "phone": "i will call you",
    "door": "the door is closed",
    "hotel": "your room is ready",
    "garden": "the garden is green",
    "car": "the car is outside",
    "box": "the box is empty",
    "bag": "your bag is here",
}
Row = dict[str, Any]


def chosen(rows: list[Row], per_word: int, but: set[str]) -> list[tuple[Row, str]]:
    """Rows without noise or room that hold exactly one of the words, so many of each at most.

    Texts in `but` are left out.
    """
    left, found = dict.fromkeys(ANSWERS, per_word), []
    for row in rows:
        words = set(row["text"].split()) & set(ANSWERS)
        if len(words) != 1 or row["condition"] != "clean" or row["text"] in but:
            continue
        (word,) = words
        if left[word]:
            left[word] -= 1
            found.append((row, word))
    return found


def make_dialog(name: str, row: Row, answer: str, spoken: np.ndarray) -> Any:
    """Writes the two recordings; gives the Lhotse cut, whose times are of the samples written."""
    from lhotse import MonoCut, Recording, SupervisionSegment

    heard, _ = soundfile.read(CORPUS / row["audio_filepath"], dtype="float32")
    start = FRAME * (-(-len(heard) // FRAME) + PAUSE_FRAMES)
    end = start + len(spoken)
    total = FRAME * (-(-end // FRAME) + REST_FRAMES)
    user, agent = np.zeros(total, np.float32), np.zeros(total, np.float32)
    user[: len(heard)], agent[start:end] = heard, spoken
    recordings = {}
    for voice, wave in (("user", user), ("agent", agent)):
        path = DIALOGS / "audio" / f"{name}_{voice}.ogg"
        write_opus(path, wave, RATE_HZ, OPUS_LEVEL)
        recording = Recording.from_file(path, recording_id=path.stem)
        recording.sources[0].source = path.relative_to(DIALOGS).as_posix()
        recordings[voice] = recording
    turns = (("user", 0.0, len(heard), row["text"]), ("agent", start, end, answer))
    source = recordings["user"]
    return MonoCut(
        id=name,
        start=0.0,
        duration=source.duration,
        channel=0,
        recording=source,
        supervisions=[
            SupervisionSegment(
                id=f"{name}_{speaker}",
                recording_id=source.id,
                start=round(begin / RATE_HZ, 4),
                duration=round((stop - begin) / RATE_HZ, 4),
                text=text,
                speaker=speaker,
            )
            for speaker, begin, stop, text in turns
        ],
        custom={"target_audio": recordings["agent"]},
    )


def main() -> None:
    """Writes corpus/dialogs and prints its size."""
    shutil.rmtree(DIALOGS, ignore_errors=True)
    (DIALOGS / "audio").mkdir(parents=True)
    spoken = {
        word: synthesize(Utterance(text=text, voice=AGENT, speed_wpm=SPEED_WPM, pitch=PITCH))
        for word, text in ANSWERS.items()
    }
    files = [CORPUS / f"{split}.jsonl" for split in PER_WORD]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    used: set[str] = set()
    for split, per_word in PER_WORD.items():
        pairs = chosen(rows, per_word, used)
        used |= {row["text"] for row, _ in pairs}
        cuts = [
            make_dialog(f"{split}{n:03d}", row, ANSWERS[word], spoken[word])
            for n, (row, word) in enumerate(pairs)
        ]
        lines = [json.dumps(cut.to_dict()) + "\n" for cut in cuts]
        (DIALOGS / f"{split}.jsonl").write_text("".join(lines))
        print(f"{split}: {len(cuts)} dialogs, {sum(cut.duration for cut in cuts):.0f} s")
    size = sum(path.stat().st_size for path in DIALOGS.rglob("*") if path.is_file())
    print(f"{DIALOGS.name}/: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
