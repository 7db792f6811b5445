"""Turn-taking: does the agent respond in time, and does it stop when the user interrupts?

Definitions of arXiv 2609.15759:

- A *response* is an agent turn that starts from 1 s before to 1.5 s after the end of a user turn.
- A user turn without a response is unanswered; an agent turn that is no response is out of place.
- A *barge-in* is a user turn that starts during an agent turn. The agent gives way if its turn ends
  within 1.5 s of that start.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.evaluation.metrics.text_metric import by_set

EARLIEST_S, LATEST_S = -1.0, 1.5
STOP_S = 1.5
NEMO_TOLERANCE_FRAMES = 13
_ROUNDING_S = 1e-6
"""A bound that is met exactly counts as met, whatever the sums of seconds round to."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Start and end times of one side's turns, in seconds, in order."""

    starts: Float[np.ndarray, " n"]
    ends: Float[np.ndarray, " n"]

    @classmethod
    def from_segments(cls, segments: Iterable[tuple[float, float]]) -> "Turns":
        """Makes turns of (start, end) pairs. Raises ValueError for end < start."""
        pairs = np.array(sorted(segments), np.float64).reshape(-1, 2)
        if (pairs[:, 1] < pairs[:, 0]).any():
            raise ValueError("a turn must not end before it starts")
        return cls(starts=pairs[:, 0], ends=pairs[:, 1])

    def segments(self) -> list[tuple[float, float]]:
        """(start, end) pairs: the inverse of `from_segments`."""
        return list(zip(self.starts.tolist(), self.ends.tolist(), strict=True))

    @classmethod
    def from_tokens(
        cls, tokens: ArrayLike, *, bos_id: int, eos_id: int, frame_s: float, first_frame: int = 0
    ) -> "Turns":
        """Reads a text channel [T], one token per frame: a turn goes from bos to eos.

        A turn without eos ends with the next bos or with the channel. `first_frame` is the frame of
        the first token: 0 for a reference, 1 for generated tokens, since a model generates a token
        after it has encoded a frame.
        """
        channel = np.asarray(tokens)
        starts: list[int] = []
        ends: list[int] = []
        for frame in np.flatnonzero((channel == bos_id) | (channel == eos_id)).tolist():
            if len(ends) < len(starts):
                ends.append(frame)
            if channel[frame] == bos_id:
                starts.append(frame)
        if len(ends) < len(starts):
            ends.append(len(channel))
        return cls(
            starts=(np.array(starts, np.float64) + first_frame) * frame_s,
            ends=(np.array(ends, np.float64) + first_frame) * frame_s,
        )


@dataclass(frozen=True, kw_only=True)
class TurnCounts:
    """Counts of turns; can be summed over conversations."""

    user_turns: int = 0
    with_response: int = 0
    """User turns with a response."""
    agent_turns: int = 0
    timely: int = 0
    """Agent turns that are a response."""
    latencies_s: tuple[float, ...] = ()
    """From the end of each user turn with a response to its first response; negative: overlap."""
    barge_ins: int = 0
    yielded: int = 0

    def __add__(self, other: "TurnCounts") -> "TurnCounts":
        return TurnCounts(
            user_turns=self.user_turns + other.user_turns,
            with_response=self.with_response + other.with_response,
            agent_turns=self.agent_turns + other.agent_turns,
            timely=self.timely + other.timely,
            latencies_s=self.latencies_s + other.latencies_s,
            barge_ins=self.barge_ins + other.barge_ins,
            yielded=self.yielded + other.yielded,
        )

    def scores(self) -> dict[str, float]:
        """Rates and latencies by name; one without events is left out."""
        rates = {
            "turn_taking_precision": (self.timely, self.agent_turns),
            "turn_taking_recall": (self.with_response, self.user_turns),
            "barge_in_success": (self.yielded, self.barge_ins),
        }
        found = {key: count / total for key, (count, total) in rates.items() if total}
        if self.user_turns:
            precision = found.get("turn_taking_precision", 0.0)
            recall = found["turn_taking_recall"]
            both = precision + recall
            found["turn_taking_f1"] = 2 * precision * recall / both if both else 0.0
        if self.latencies_s:
            # fsum: the same in any order, however conversations are split over processes
            latency_s = math.fsum(self.latencies_s) / len(self.latencies_s)
            found["turn_taking_latency_mean_s"] = latency_s
            found["turn_taking_latency_median_s"] = float(np.median(self.latencies_s))
        return found


def count_turns(user: Turns, agent: Turns) -> TurnCounts:
    """Compares the two sides of one conversation."""
    delays = agent.starts[None] - user.ends[:, None]  # [user turns, agent turns]
    is_response = (delays >= EARLIEST_S - _ROUNDING_S) & (delays <= LATEST_S + _ROUNDING_S)
    has_response = is_response.any(axis=1)
    first = np.where(is_response, delays, np.inf).min(axis=1, initial=np.inf)
    begins = user.starts[:, None]
    interrupts = (agent.starts[None] < begins) & (begins < agent.ends[None])
    stops = agent.ends[None] - begins <= STOP_S + _ROUNDING_S
    return TurnCounts(
        user_turns=len(user.starts),
        with_response=int(has_response.sum()),
        agent_turns=len(agent.starts),
        timely=int(is_response.any(axis=0).sum()),
        latencies_s=tuple(first[has_response].tolist()),
        barge_ins=int(interrupts.sum()),
        yielded=int((interrupts & stops).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class TurnMark:
    """An event between the two sides, for the report; times in seconds."""

    kind: str
    """response, unanswered, barge_in (the agent gave way), talked_over (it did not)."""
    start_s: float
    end_s: float
    """Of a response, the agent's start (`start_s` is the user's end); of a barge-in, the agent's
    end (`start_s` is the user's start)."""

    @property
    def seconds(self) -> float:
        """Duration; negative if the response starts before the user's turn ends."""
        return self.end_s - self.start_s


def turn_marks(user: Turns, agent: Turns) -> list[TurnMark]:
    """The events that `count_turns` counts, in order of time."""
    marks = []
    for end in user.ends:
        delays = agent.starts - end
        fits = delays[(delays >= EARLIEST_S - _ROUNDING_S) & (delays <= LATEST_S + _ROUNDING_S)]
        kind = "response" if len(fits) else "unanswered"
        until = end + (float(fits.min()) if len(fits) else LATEST_S)
        marks.append(TurnMark(kind=kind, start_s=float(end), end_s=float(until)))
    for begin in user.starts:
        for stop in agent.ends[(agent.starts < begin) & (begin < agent.ends)]:
            gave_way = stop - begin <= STOP_S + _ROUNDING_S
            kind = "barge_in" if gave_way else "talked_over"
            marks.append(TurnMark(kind=kind, start_s=float(begin), end_s=float(stop)))
    return sorted(marks, key=lambda mark: mark.start_s)


class TurnTaking:
    """Scores of all turns: `KEY_SET` per data set, and `KEY`, the mean over the sets that have it.

    Keys: `turn_taking_precision`, `_recall`, `_f1`, `_latency_mean_s`, `_latency_median_s`, and
    `barge_in_success`.
    """

    def __init__(self) -> None:
        self._counts: dict[str, TurnCounts] = {}

    def update(self, name: str, user: Turns, agent: Turns) -> None:
        """Adds one conversation of data set `name`."""
        self._add(name, count_turns(user, agent))

    def merge(self, other: "TurnTaking") -> None:
        """Adds the counts of another one."""
        for name, counts in other._counts.items():
            self._add(name, counts)

    def compute(self) -> dict[str, float]:
        """All scores by name; empty if nothing was added."""
        return _by_key({name: counts.scores() for name, counts in self._counts.items()})

    def _add(self, name: str, counts: TurnCounts) -> None:
        self._counts[name] = self._counts.get(name, TurnCounts()) + counts


class FirstTurnAccuracy:
    """NeMo's score in training: the agent's first bos is close to the user's first eos.

    `turn_taking_acc_SET` is the share of conversations (with a user eos) in which the two are at
    most `tolerance_frames` apart. `turn_taking_latency_SET` is the mean distance of these, in
    seconds.
    """

    def __init__(
        self,
        *,
        bos_id: int,
        eos_id: int,
        frame_s: float = 0.08,
        tolerance_frames: int = NEMO_TOLERANCE_FRAMES,
    ) -> None:
        self._ids = bos_id, eos_id
        self._frame_s = frame_s
        self._tolerance = tolerance_frames
        self._distances: dict[str, list[int | None]] = {}

    def update(self, name: str, user_tokens: ArrayLike, agent_tokens: ArrayLike) -> None:
        """Adds text channels [B, T] of both sides. Raises ValueError if their numbers differ."""
        bos_id, eos_id = self._ids
        rows = zip(np.asarray(user_tokens), np.asarray(agent_tokens), strict=True)
        for user, agent in rows:
            ends, begins = np.flatnonzero(user == eos_id), np.flatnonzero(agent == bos_id)
            if len(ends):
                distance = int(begins[0] - ends[0]) if len(begins) else None
                self._distances.setdefault(name, []).append(distance)

    def merge(self, other: "FirstTurnAccuracy") -> None:
        """Adds the distances of another one."""
        for name, distances in other._distances.items():
            self._distances.setdefault(name, []).extend(distances)

    def compute(self) -> dict[str, float]:
        """Both scores by name, and their means over the sets; empty if nothing was added."""
        return _by_key({name: self._scores(rows) for name, rows in self._distances.items()})

    def _scores(self, distances: list[int | None]) -> dict[str, float]:
        hits = [d for d in distances if d is not None and abs(d) <= self._tolerance]
        scores = {"turn_taking_acc": len(hits) / len(distances)}
        if hits:
            scores["turn_taking_latency"] = sum(hits) / len(hits) * self._frame_s
        return scores


def _by_key(sets: dict[str, dict[str, float]]) -> dict[str, float]:
    """Turns scores by set and key into `KEY_SET` and `KEY`."""
    keys = dict.fromkeys(key for scores in sets.values() for key in scores)
    named: dict[str, float] = {}
    for key in keys:
        named |= by_set(key, {name: scores[key] for name, scores in sets.items() if key in scores})
    return named
