"""Makes a table of when each word of the bundled corpus begins and ends, as espeak-ng tells.

    python tools/corpus/make_word_times.py test tests/data/word_times/test.jsonl
    python tools/corpus/make_word_times.py train OUT.jsonl

writes one JSON object a recording: its `audio_filepath` and `text`, and `starts` and `ends`, in
seconds, of the text's words, or null where espeak-ng tells none: it joins short words to the word
before or after them ("in the"). A word ends where the next word or a pause begins. `test` is the
whole test set, `train` the validation set and every eighth training recording. Needs espeak-ng; the
version that made the corpus, so that recordings and times fit. Checks that their lengths do.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from make_corpus import CORPUS, SEED, plan_test, plan_training
from phonemes import SpokenText, WordEvent, speak_words
from synthesis import RATE_HZ, Utterance, recorded_at_s, synthesize
from tqdm import tqdm

TRAIN_STRIDE = 8
PAUSE = "_"
"""First letter of the names of phonemes of silence."""
LENGTH_TOLERANCE_S = 0.03


def rows_of(name: str) -> list[dict]:
    """The rows of a manifest."""
    return [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text().splitlines()]


def utterances(split: str) -> Iterator[tuple[dict, Utterance]]:
    """Each row of a split, and what was spoken for it. Raises ValueError if they do not fit."""
    if split == "test":
        rows, planned = rows_of("test"), plan_test(np.random.default_rng((SEED, 1)))
    else:
        rows = [*rows_of("validation"), *rows_of("train")[::TRAIN_STRIDE]]
        planned = plan_training(np.random.default_rng((SEED, 0)))
    for row in rows:
        utterance = planned[int(Path(row["audio_filepath"]).stem)]
        utterance = replace(utterance, speed_wpm=row["speed"])
        found = (utterance.text, utterance.voice.name, utterance.pitch)
        if found != (row["text"], row["voice"], row["pitch"]):
            raise ValueError(f"{row['audio_filepath']}: the plan of the corpus has changed")
        yield row, utterance


def word_times(utterance: Utterance) -> tuple[list[float | None], list[float | None]]:
    """Starts and ends of the words in the recording, in seconds."""
    voice = utterance.voice.spec
    spoken = speak_words(utterance.text, voice, utterance.speed_wpm, utterance.pitch)
    shift_s = recorded_at_s(utterance)
    starts: list[float | None] = []
    ends: list[float | None] = []
    place = 0
    for word in utterance.text.split():
        event = _event_of(spoken, place, len(word))
        start_s = None if event is None else event.start_s
        end_s = None if event is None else _end_s(spoken, event, place + len(word))
        starts.append(None if start_s is None else round(start_s + shift_s, 3))
        ends.append(None if end_s is None else round(end_s + shift_s, 3))
        place += len(word) + 1
    return starts, ends


def _event_of(spoken: SpokenText, first: int, length: int) -> WordEvent | None:
    """The event of exactly the word at `first`."""
    return next((e for e in spoken.words if (e.first, e.length) == (first, length)), None)


def _end_s(spoken: SpokenText, event: WordEvent, end: int) -> float | None:
    """Where the word after it begins, or a pause; None if the next word has no event."""
    following = next((e for e in spoken.words if e.first > event.first and e.length), None)
    if following is not None and following.first != end + 1:
        return None
    pauses = [t for t, name in spoken.phonemes if name.startswith(PAUSE) and t > event.start_s]
    bounds = [*([] if following is None else [following.start_s]), *pauses]
    return min(bounds, default=None)


def check_length(row: dict, utterance: Utterance) -> None:
    """Raises ValueError unless the recording has the length of what espeak-ng says now."""
    seconds = len(synthesize(utterance)) / RATE_HZ
    if abs(seconds - row["duration"]) > LENGTH_TOLERANCE_S:
        raise ValueError(
            f"{row['audio_filepath']} has {row['duration']} s, but this espeak-ng says {seconds} s"
        )


def main(split: str, out: Path) -> None:
    """Writes the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, utterance in tqdm(list(utterances(split)), unit="recording"):
        check_length(row, utterance)
        starts, ends = word_times(utterance)
        named = {"audio_filepath": row["audio_filepath"], "text": row["text"]}
        lines.append(json.dumps({**named, "starts": starts, "ends": ends}) + "\n")
    out.write_text("".join(lines))
    print(f"{out}: {len(lines)} recordings")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("test", "train"):
        sys.exit("usage: python tools/corpus/make_word_times.py test|train OUT.jsonl")
    main(sys.argv[1], Path(sys.argv[2]))
