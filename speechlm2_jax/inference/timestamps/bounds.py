"""From the frames of labels to the times of words.

CTC fixes the order of labels, but not when in a label's sound its frame is: a label of many letters
comes late in its sound, and where labels are nearly as many as frames, they fill the silence around
the words too. So the times of a phrase are found together, by least squares. A phrase is what lies
between two silences. The unknowns are the times between its labels. Known, each with a standard
deviation, are

- the middle of a label's frames: it comes `emission_point` of the way from the label's start to its
  end, and `delay_frames` later;
- the duration of a label: its letters times the seconds per letter of the phrase;
- the first and last time of the phrase: where the silences end and begin.

The constants of `Timing` were measured on the bundled encoder; docs/timestamps.md has the numbers.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from speechlm2_jax.inference.timestamps.speech import Silence

LETTER_S = 0.075
"""Seconds per letter where a phrase is too short to measure it."""
LETTER_RANGE_S = (0.03, 0.2)
"""Least and most seconds per letter."""
MIN_LETTERS = 4
"""A phrase of fewer letters has the duration LETTER_S for each."""
GAP_S = 0.6
"""Blank frames between two words for so long separate phrases, even if there is no silence."""
NEAR_S = 0.4
"""A silence counts for a phrase if it ends, or begins, as near to where the labels expect it."""
LEAST_LETTERS = 0.5
"""Duration, in letters, of a label without any: a mark."""

Edges = tuple[float | None, float | None]
"""First and last time of a phrase, if silences tell them."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How the labels of an ASR model lie in time, measured on recordings with known times."""

    emission_point: float = 0.75
    """Share of a label's duration that has passed at the middle of its frames, ..."""
    delay_frames: float = 0.875
    """... which are so many frames late."""
    emission_sd_frames: float = 1.25
    """Standard deviation of that middle."""
    letter_sd_s: float = 0.03
    """Standard deviation of the duration of one letter; that of n is sqrt(n) times as large."""
    edge_sd_s: float = 0.03
    """Standard deviation of the times at which silences end and begin."""


CTC_TIMING = Timing()
"""Measured on the bundled encoder, for every CTC model of which nothing else is known."""
TRANSDUCER_TIMING = Timing(emission_point=0.5, delay_frames=0.0)
"""A label's sound is taken to be its frames, as NeMo does. No transducer was measured."""


class TimedLabel(NamedTuple):
    """One label of a text, or a word that has none."""

    word: int
    """Index of the word."""
    letters: int
    emitted: tuple[float, float] | None
    """Start and end of its frames in seconds; None for a word without labels."""

    @property
    def middle(self) -> float | None:
        """The middle of its frames."""
        return None if self.emitted is None else sum(self.emitted) / 2


class Span(NamedTuple):
    """Start and end of a word in seconds."""

    start: float
    end: float


def word_spans(
    labels: Sequence[TimedLabel],
    silences: Sequence[Silence],
    *,
    frame_s: float,
    timing: Timing = CTC_TIMING,
) -> list[Span]:
    """Finds start and end of each word. Every word has at least one of `labels`, in order.

    `silences` are those of `find_silences`: the first and last are the recording's edges. Spans do
    not overlap, and lie within the recording. Words of a phrase follow each other without gaps.
    """
    if not labels:
        return []
    breaks = _breaks(labels, silences)
    places = [0, *breaks, len(labels)]
    around = [silences[0], *breaks.values(), silences[-1]]
    spans: list[Span] = []
    for n, (first, last) in enumerate(zip(places, places[1:], strict=False)):
        phrase = labels[first:last]
        edges = _edges(phrase, (around[n], around[n + 1]), frame_s, timing)
        times = _phrase_times(phrase, edges, frame_s, timing)
        starts = [i for i in range(len(phrase)) if not i or phrase[i - 1].word != phrase[i].word]
        ends = [*starts[1:], len(phrase)]
        spans += [Span(times[a], times[b]) for a, b in zip(starts, ends, strict=True)]
    return _in_order(spans, silences[-1].end)


def _breaks(labels: Sequence[TimedLabel], silences: Sequence[Silence]) -> dict[int, Silence | None]:
    """Where phrases begin, after the first: index of a word's first label -> the silence before."""
    starts = [i for i in range(1, len(labels)) if labels[i].word != labels[i - 1].word]
    gaps = [(gap, i) for i in starts if (gap := _gap(labels, i)) is not None]
    begins, ends = [gap.start for gap, _ in gaps], [gap.end for gap, _ in gaps]
    found: dict[int, Silence | None] = {}
    for silence in silences[1:-1]:
        middle = silence.middle
        first = bisect.bisect_left(ends, middle - NEAR_S)
        last = bisect.bisect_right(begins, middle + NEAR_S)
        near = ((gap, i) for gap, i in gaps[first:last] if i not in found)
        away = {i: max(gap.start - middle, middle - gap.end, 0.0) for gap, i in near}
        if away:
            found[min(away, key=lambda i: away[i])] = silence
    for gap, i in gaps:
        if i not in found and gap.end - gap.start >= GAP_S:
            found[i] = None
    return dict(sorted(found.items()))


def _gap(labels: Sequence[TimedLabel], index: int) -> Span | None:
    """The time between the middles of a label's frames and of the one before, if both have any."""
    before, here = labels[index - 1].middle, labels[index].middle
    return None if here is None or before is None else Span(before, here)


def _edges(
    labels: Sequence[TimedLabel],
    silences: tuple[Silence | None, Silence | None],
    frame_s: float,
    timing: Timing,
) -> Edges:
    """Start and end of the sound of a phrase, as far as the silences around it tell.

    A silence that ends far from where the first label seems to start tells nothing: there is other
    sound between. Likewise the silence after the last label.
    """
    delay_s, point = timing.delay_frames * frame_s, timing.emission_point
    before, after = silences
    first, last = labels[0], labels[-1]
    start = None if before is None else before.end
    end = None if after is None else after.start
    if start is not None and first.middle is not None:
        expected = first.middle - delay_s - point * first.letters * LETTER_S
        start = start if abs(expected - start) <= NEAR_S else None
    if end is not None and last.middle is not None:
        expected = last.middle - delay_s + (1 - point) * last.letters * LETTER_S
        end = end if abs(expected - end) <= NEAR_S else None
    return start, end


def _phrase_times(
    labels: Sequence[TimedLabel], edges: Edges, frame_s: float, timing: Timing
) -> list[float]:
    """The times between the labels of a phrase, its start and end included: one more than labels.

    Solves the normal equations of the least squares, whose matrix is tridiagonal.
    """
    letters = np.array([max(x.letters, LEAST_LETTERS) for x in labels])
    middles = [x.middle for x in labels]
    if not any(m is not None for m in middles) and edges[0] is None:
        edges = (0.0, edges[1])  # something must be known
    per_letter = _letter_s(letters, middles, edges, timing)
    count = len(labels) + 1
    diagonal, beside, right = np.zeros(count), np.zeros(count - 1), np.zeros(count)

    def add(i: int, weights: tuple[float, float], value: float, sd: float) -> None:
        """One equation: weights[0] * time[i] + weights[1] * time[i + 1] = value."""
        for k, weight in enumerate(weights):
            if weight:
                diagonal[i + k] += (weight / sd) ** 2
                right[i + k] += weight * value / sd**2
        if weights[0] and weights[1]:
            beside[i] += weights[0] * weights[1] / sd**2

    point, delay_s = timing.emission_point, timing.delay_frames * frame_s
    for i, (n, middle) in enumerate(zip(letters, middles, strict=True)):
        add(i, (-1.0, 1.0), n * per_letter, timing.letter_sd_s * float(np.sqrt(n)))
        if middle is not None:
            add(i, (1 - point, point), middle - delay_s, timing.emission_sd_frames * frame_s)
    for i, edge in zip((0, count - 1), edges, strict=True):
        if edge is not None:
            add(i, (1.0, 0.0), edge, timing.edge_sd_s)
    from scipy.linalg import solveh_banded  # 0.1 s, which texts without times need not wait for

    times = solveh_banded(np.stack([np.concatenate([[0.0], beside]), diagonal]), right)
    return np.maximum.accumulate(times).tolist()


def _letter_s(
    letters: np.ndarray, middles: Sequence[float | None], edges: Edges, timing: Timing
) -> float:
    """Seconds per letter of a phrase: between its silences, else between its outermost labels."""
    start, end = edges
    emitted = [(i, m) for i, m in enumerate(middles) if m is not None]
    measured = LETTER_S
    if start is not None and end is not None and letters.sum() >= MIN_LETTERS:
        measured = (end - start) / float(letters.sum())
    elif len(emitted) > 1:
        (a, first), (b, last) = emitted[0], emitted[-1]
        point = timing.emission_point
        between = letters[a + 1 : b].sum() + (1 - point) * letters[a] + point * letters[b]
        measured = (last - first) / between if between >= MIN_LETTERS else LETTER_S
    return float(np.clip(measured, *LETTER_RANGE_S))


def _in_order(spans: Sequence[Span], duration_s: float) -> list[Span]:
    """Spans within the recording, none before the end of the one before."""
    ordered, least = [], 0.0
    for span in spans:
        start = min(max(span.start, least), duration_s)
        least = min(max(span.end, start), duration_s)
        ordered.append(Span(start, least))
    return ordered
