"""Aligns words with recordings by the frames of a transducer's own transcript.

A transducer has no frame of every label of a known text. But it tells the frame of each label that
it emits by itself. Edit distance joins the letters of its transcript to the letters of the text:
Levenshtein's, where a letter that is replaced by another keeps its time.
"""

from collections.abc import Callable, Sequence
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
                found[i] = joined(words[i], self.encoder.letters(labels), frames * self.frame_s)
        return [found[i] for i in range(len(waves))]

    def _hypotheses(self, waves: Sequence[np.ndarray]) -> Hypotheses:
        """Transcribes a batch, with silence around each recording."""
        pad = SILENT_FRAMES * self.frame_samples
        samples = round_up(max(map(len, waves)) + 2 * pad, SAMPLE_UNIT)
        rows = round_up(len(waves), 1)
        padded = pad_right([np.pad(w, pad) for w in waves], rows=rows, width=samples)
        return jax.device_get(self.decode(*padded))


def joined(words: Sequence[str], labels: Sequence[str], spans: np.ndarray) -> AlignedLabels:
    """Joins the letters of each label of a transcript to the letters of the words.

    `spans` [U, 2] are start and end of each label in seconds. A label whose letters belong to two
    words counts for both.
    """
    from rapidfuzz.distance import Levenshtein  # not a part of the JAX stack

    plain = [plain_letters(word) for word in words]
    text, transcript = _Letters.of(plain), _Letters.of(labels)
    shared: dict[tuple[int, int], int] = {}
    for step in Levenshtein.opcodes(text.text, transcript.text):
        if step.tag in ("equal", "replace"):
            for a, b in zip(
                range(step.src_start, step.src_end),
                range(step.dest_start, step.dest_end),
                strict=False,
            ):
                pair = text.owners[a], transcript.owners[b]
                shared[pair] = shared.get(pair, 0) + 1
    same = len(text.text) and 1 - Levenshtein.normalized_distance(text.text, transcript.text)
    problem = None
    if text.text and same < LEAST_SHARE:
        problem = "the ASR model's own transcript of it is another text"
        shared = {}
    timed: list[TimedLabel] = []
    for number, word in enumerate(plain):
        own = [(label, count) for (w, label), count in shared.items() if w == number]
        timed += [TimedLabel(number, n, (spans[i, 0], spans[i, 1])) for i, n in sorted(own)]
        if not own:
            timed.append(TimedLabel(number, len(word), None))
    return AlignedLabels(tuple(timed), (None,) * len(timed), None, problem)
