"""Makes corpus/dialogs: users ask questions aloud, an agent responds in one voice.

    python tools/corpus/make_dialogs.py

Questions and responses are those of dialog_questions.txt. Users pause, say "okay" while the agent
talks, and interrupt it; then it stops and responds to the new question. Each utterance is recorded
once; conversations are Lhotse cuts that mix stretches of the recordings (dialog_timeline.py), so
the agent's responses are the same samples wherever they occur.

- train.jsonl.gz: one to three questions each, with everything above.
- validation.jsonl.gz: other wordings and voices, no interruptions.
- test/*.jsonl.gz: other wordings and voices again. A file for each thing to measure, named as the
  tasks of Full-Duplex-Bench.

Needs the synthesizers of natural_voices.py, espeak-ng and lhotse. Piper draws at random: another
run gives another recording of the agent.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import gzip
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dialog_recordings as recordings
import numpy as np
from dialog_recordings import FRAME, RATE_HZ, Stretch, Tape
from dialog_texts import BACK_CHANNELS, TEST, TRAIN, VALIDATION, Question, Wording, questions
from dialog_timeline import STOP_FRAMES, Asked, Exchange, Response, Timeline
from synthesis import NOISES

DIALOGS = Path(__file__).parents[2] / "corpus" / "dialogs"
SEED = 24
VOICES_OF_WORDING = {TRAIN: 4, VALIDATION: 2, TEST: 2}
USES = 2
"""Conversations in which each training utterance occurs."""
TURNS = ((1, 2, 3), (0.3, 0.4, 0.3))
"""Questions of a training conversation, and how often."""
INTERRUPTED, BACK_CHANNELLED, NOISY = 0.35, 0.3, 0.35
STOPS = (11, 13, 15, 17, 19)
"""Frames after which a response may be stopped."""
TEST_SETS = ("smooth_turn_taking", "pause_handling", "user_backchannel", "user_interruption")
LEFT_FRAMES = 3
"""What is left of a stopped response at least."""


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A user: questions and back-channels in one voice."""

    voice: str
    asked: Sequence[Asked]
    paused: Sequence[Asked]
    """In two parts."""
    back_channels: Sequence[tuple[str, Stretch]]


def record_agent(tape: Tape, asked: Sequence[Question]) -> dict[str, Response]:
    """Each response, whole and stopped at two of STOPS."""
    found = {}
    for n, question in enumerate(asked):
        text = question.response
        wave = recordings.agent_speech(text)
        frames = len(wave) // FRAME
        stops = [stop for stop in STOPS if STOP_FRAMES < stop <= frames - LEFT_FRAMES]
        chosen = [stops[(n + k * len(stops) // 2) % len(stops)] for k in range(2)]
        stopped = {stop: tape.add(recordings.stopped(wave, stop)) for stop in sorted({*chosen})}
        found[text] = Response(text=text, whole=tape.add(wave), stopped=stopped)
    return found


def cast(split: str, asked: Sequence[Question], rng: np.random.Generator) -> list[list[Any]]:
    """For each voice of a split its (question, wording, is paused): all wordings, evenly."""
    voices = recordings.USERS[split]
    order = itertools.chain.from_iterable(rng.permutation(len(voices)) for _ in itertools.count())
    lines: list[list[Any]] = [[] for _ in voices]
    number = 0
    for question in asked:
        for wording in question.wordings[split]:
            for take in range(VOICES_OF_WORDING[split]):
                # three of eight pause in training, one of two elsewhere
                is_paused = take < 1 + number % 2 if split == TRAIN else take == 1
                lines[next(order)].append((question, wording, is_paused))
            number += 1
    return lines


def record_speakers(
    split: str, asked: Sequence[Question], responses: dict[str, Response], rng: np.random.Generator
) -> list[Speaker]:
    """Records every utterance of a split, a file for each voice."""
    speakers = []
    for voice, lines in zip(recordings.USERS[split], cast(split, asked, rng), strict=True):
        tape = Tape(DIALOGS / "audio" / f"{split}_{voice}.ogg", recordings.USER_LEVEL)
        found: dict[bool, list[Asked]] = {True: [], False: []}
        for question, wording, is_paused in lines:
            parts = _record_question(tape, voice, wording, is_paused, rng)
            response = responses[question.response]
            found[is_paused].append(Asked(text=wording.text, parts=parts, response=response))
            if split != TRAIN and is_paused:  # the same without a pause, in the same voice
                parts = _record_question(tape, voice, wording, False, rng)
                found[False].append(Asked(text=wording.text, parts=parts, response=response))
        words = [BACK_CHANNELS[(len(speakers) + k) % len(BACK_CHANNELS)] for k in (0, 2)]
        heard = [(text, _record(tape, voice, text, False, rng)) for text in words]
        tape.write()
        speakers.append(
            Speaker(voice=voice, asked=found[False], paused=found[True], back_channels=heard)
        )
        print(f"{tape.path.name}: {tape.samples / RATE_HZ:.0f} s", flush=True)
    return speakers


def _record_question(
    tape: Tape, voice: str, wording: Wording, is_paused: bool, rng: np.random.Generator
) -> list[Stretch]:
    has_room = bool(rng.random() < recordings.ROOM_SHARE)
    texts = (wording.begin, wording.rest) if is_paused else (wording.text,)
    return [_record(tape, voice, text, has_room, rng) for text in texts]


def _record(tape: Tape, voice: str, text: str, has_room: bool, rng: np.random.Generator) -> Stretch:
    wave = recordings.speak(text, voice, rng, has_room=has_room)
    return tape.add(wave, recordings.LEAD, recordings.TAIL)


def training(speakers: Sequence[Speaker], rng: np.random.Generator) -> Iterator[Any]:
    """(voice, exchanges) of the training conversations."""
    for speaker in speakers:
        everything = [*speaker.asked, *speaker.paused]
        order = [everything[i] for _ in range(USES) for i in rng.permutation(len(everything))]
        while order:
            count = min(int(rng.choice(TURNS[0], p=TURNS[1])), len(order))
            taken, order = order[:count], order[count:]
            yield (
                speaker.voice,
                [
                    _exchange(asked, speaker, rng, may_stop=n < count - 1)
                    for n, asked in enumerate(taken)
                ],
            )


def _exchange(
    asked: Asked, speaker: Speaker, rng: np.random.Generator, *, may_stop: bool
) -> Exchange:
    is_interrupted = may_stop and bool(rng.random() < INTERRUPTED)
    back = None
    if not is_interrupted and rng.random() < BACK_CHANNELLED:
        back = speaker.back_channels[int(rng.integers(len(speaker.back_channels)))]
    return Exchange(asked=asked, is_interrupted=is_interrupted, back_channel=back)


def validation(speakers: Sequence[Speaker], rng: np.random.Generator) -> Iterator[Any]:
    """(voice, exchanges) of one or two questions, half with a pause."""
    for speaker in speakers:
        everything = [*speaker.asked[: len(speaker.paused)], *speaker.paused]
        order = [everything[i] for i in rng.permutation(len(everything))]
        while order:
            taken, order = order[:2], order[2:]
            for chosen in [taken] if rng.random() < 0.5 else [[one] for one in taken]:
                yield (
                    speaker.voice,
                    [_exchange(one, speaker, rng, may_stop=False) for one in chosen],
                )


def tests(speakers: Sequence[Speaker], rng: np.random.Generator) -> dict[str, list[Any]]:
    """(voice, exchanges) of each test set."""
    found: dict[str, list[Any]] = {name: [] for name in TEST_SETS}
    for speaker in speakers:
        voice = speaker.voice
        for n, one in enumerate(speaker.asked):
            found["smooth_turn_taking"].append((voice, [Exchange(asked=one)]))
            if n % 2:
                continue
            back = speaker.back_channels[n // 2 % len(speaker.back_channels)]
            found["user_backchannel"].append((voice, [Exchange(asked=one, back_channel=back)]))
            other = speaker.asked[int(rng.integers(len(speaker.asked)))]
            while other.response is one.response:
                other = speaker.asked[int(rng.integers(len(speaker.asked)))]
            both = [Exchange(asked=one, is_interrupted=True), Exchange(asked=other)]
            found["user_interruption"].append((voice, both))
        found["pause_handling"] += [(voice, [Exchange(asked=one)]) for one in speaker.paused]
    return found


def write_set(
    name: str, planned: Sequence[Any], noises: Sequence[Stretch], rng: np.random.Generator
) -> None:
    """Writes one manifest below DIALOGS; prints its size."""
    path = DIALOGS / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    cuts = []
    for n, (voice, exchanges) in enumerate(planned):
        timeline = Timeline(rng=rng)
        timeline.write(exchanges)
        noise = noises[int(rng.integers(len(noises)))] if rng.random() < NOISY else None
        cuts.append(timeline.cut(f"{path.name.split('.')[0]}{n:03d}", voice, noise, path.parent))
    lines = "".join(json.dumps(cut) + "\n" for cut in cuts)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    seconds = sum(cut["tracks"][0]["cut"]["duration"] for cut in cuts)
    print(f"{name}: {len(cuts)} conversations, {seconds:.0f} s", flush=True)


def main() -> None:
    """Writes corpus/dialogs and prints its size."""
    shutil.rmtree(DIALOGS, ignore_errors=True)
    rng, asked = np.random.default_rng(SEED), questions()
    agent = Tape(DIALOGS / "audio" / "agent.ogg", recordings.AGENT_LEVEL)
    responses = record_agent(agent, asked)
    agent.write()
    behind = Tape(DIALOGS / "audio" / "noise.ogg", recordings.NOISE_LEVEL)
    noises = [behind.add(recordings.noise(kind, rng)) for kind in NOISES]
    behind.write()
    speakers = {split: record_speakers(split, asked, responses, rng) for split in recordings.USERS}
    write_set(TRAIN, list(training(speakers[TRAIN], rng)), noises, rng)
    write_set(VALIDATION, list(validation(speakers[VALIDATION], rng)), noises, rng)
    for name, planned in tests(speakers[TEST], rng).items():
        write_set(f"{TEST}/{name}", planned, noises, rng)
    size = sum(path.stat().st_size for path in DIALOGS.rglob("*") if path.is_file())
    print(f"{DIALOGS.name}/: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
