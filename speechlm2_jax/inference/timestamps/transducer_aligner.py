"""Aligns words with recordings by the frames of a transducer's own transcript.

A transducer has no frame of every label of a known text. But it tells the frame of each label that
it emits by itself. Edit distance joins the letters of its transcript to the letters of the text:
Levenshtein's, where a letter that is replaced by another keeps its time.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from speechlm2_jax.asr.greedy import Hypotheses
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.inference.padding import SAMPLE_UNIT, round_up
from speechlm2_jax.inference.timestamps.aligner import AlignedLabels
from speechlm2_jax.inference.timestamps.bounds import TRANSDUCER_TIMING, TimedLabel, Timing
from speechlm2_jax.inference.timestamps.ctc_aligner import DEFAULT_BATCH_SIZE, SILENT_FRAMES
from speechlm2_jax.pretrained.label_encoder import LabelEncoder, plain_letters

LEAST_SHARE = 0.3
"""A text of which the transcript has a smaller share of letters is another text."""


class _Letters(NamedTuple):
    """The letters of a text one after the other, and whose each is: a word's or a label's."""

    text: str
    owners: list[int]

    @classmethod
    def of(cls, parts: Sequence[str]) -> "_Letters":
        """The letters of words or labels."""
        return cls("".join(parts), [n for n, part in enumerate(parts) for _ in part])


@dataclass(frozen=True, kw_only=True)
class TransducerAligner:
    """An RNN-T or TDT model that aligns known texts with recordings."""

    decode: Callable[[np.ndarray, np.ndarray], Hypotheses]
    """Audio float32 [B, S] and lengths int32 [B] -> greedy labels with their frames."""
    encoder: LabelEncoder
    sampling_rate: int
    """Samples per second of the input."""
    frame_samples: int
    """Samples behind one frame."""
    batch_size: int = DEFAULT_BATCH_SIZE
    timing: Timing = TRANSDUCER_TIMING

    @property
    def frame_s(self) -> float:
        """Duration of a frame in seconds."""
        return self.frame_samples / self.sampling_rate

    def align(
        self, waves: Sequence[np.ndarray], words: Sequence[Sequence[str]]
    ) -> list[AlignedLabels]:
        """Aligns the words of each recording (float32 [S] at `sampling_rate`)."""
        order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
        found: dict[int, AlignedLabels] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            hypotheses = self._hypotheses([waves[i] for i in chosen])
            for n, i in enumerate(chosen):
                count = int(hypotheses.lengths[n])
                labels = np.asarray(hypotheses.labels[n, :count]).tolist()
                first = np.asarray(hypotheses.frames[n, :count])
                end = first + np.maximum(np.asarray(hypotheses.durations[n, :count]), 1)
                frames = np.stack([first, end], axis=1) - SILENT_FRAMES
                letters, seconds = self.encoder.letters(labels), frames * self.frame_s
                kept = hypotheses.log_probs
                log_probs = None if kept is None else np.asarray(kept[n, :count]).tolist()
                numbers = self.encoder.word_numbers(labels)
                found[i] = joined(words[i], letters, seconds, log_probs, numbers)
        return [found[i] for i in range(len(waves))]

    def _hypotheses(self, waves: Sequence[np.ndarray]) -> Hypotheses:
        """Transcribes a batch, with silence around each recording."""
        pad = SILENT_FRAMES * self.frame_samples
        samples = round_up(max(map(len, waves)) + 2 * pad, SAMPLE_UNIT)
        rows = round_up(len(waves), 1)
        padded = pad_right([np.pad(w, pad) for w in waves], rows=rows, width=samples)
        return jax.device_get(self.decode(*padded))


def joined(
    words: Sequence[str],
    labels: Sequence[str],
    spans: np.ndarray,
    log_probs: Sequence[float] | None = None,
    numbers: Sequence[int] | None = None,
) -> AlignedLabels:
    """Joins the letters of each label of a transcript to the letters of the words.

    `spans` [U, 2] are start and end of each label in seconds. A label whose letters belong to two
    words counts for both. Its log-probability is that of words which the transcript spells alike,
    letter by letter. `numbers` [U] tell the word of the transcript that each label belongs to; by
    default each is a word.
    """
    plain = [plain_letters(word) for word in words]
    pairs = _pairs(_Letters.of(plain), _Letters.of(labels))
    count = sum(map(len, plain))
    alike = sum(own.equal for shared in pairs.values() for own in shared.values())
    problem = None
    if count and alike < LEAST_SHARE * count:
        problem = "the ASR model's own transcript of it is another text"
        pairs = {}
    alike_words = _alike(plain, labels, pairs, range(len(labels)) if numbers is None else numbers)
    timed: list[TimedLabel] = []
    known: list[float | None] = []
    for number, word in enumerate(plain):
        own = sorted(pairs.get(number, {}).items())
        for i, shared in own:
            span = (float(spans[i, 0]), float(spans[i, 1]))
            timed.append(TimedLabel(number, shared.equal + shared.replaced, span))
            is_known = number in alike_words
            known.append(float(log_probs[i]) if is_known and log_probs is not None else None)
        if not own:
            timed.append(TimedLabel(number, len(word), None))
            known.append(None)
    return AlignedLabels(tuple(timed), tuple(known), None, problem)


class _Shared(NamedTuple):
    """How many letters a word and a label share."""

    equal: int = 0
    replaced: int = 0


def _alike(
    words: Sequence[str],
    labels: Sequence[str],
    pairs: Mapping[int, Mapping[int, _Shared]],
    numbers: Sequence[int],
) -> set[int]:
    """The words of the text that have just the letters of their words of the transcript."""
    unmatched = Counter[int]()  # letters of each word of the transcript that are no word's
    for number, label in zip(numbers, labels, strict=True):
        unmatched[number] += len(label)
    for own in pairs.values():
        for label, shared in own.items():
            unmatched[numbers[label]] -= shared.equal
    return {
        word
        for word, own in pairs.items()
        if sum(shared.equal for shared in own.values()) == len(words[word])
        and not any(unmatched[numbers[label]] for label in own)
    }


def _pairs(text: _Letters, transcript: _Letters) -> dict[int, dict[int, _Shared]]:
    """Word -> label -> their shared letters, by the edit distance of the two texts."""
    from rapidfuzz.distance import Levenshtein  # not a part of the JAX stack

    pairs: dict[int, dict[int, _Shared]] = {}
    for step in Levenshtein.opcodes(text.text, transcript.text):
        if step.tag not in ("equal", "replace"):
            continue
        is_equal = step.tag == "equal"
        for a in range(step.src_end - step.src_start):
            word, label = text.owners[step.src_start + a], transcript.owners[step.dest_start + a]
            own = pairs.setdefault(word, {})
            before = own.get(label, _Shared())
            own[label] = _Shared(before.equal + is_equal, before.replaced + (not is_equal))
    return pairs
