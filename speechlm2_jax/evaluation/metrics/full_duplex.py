"""Full-Duplex-Bench: does the agent take the floor when it should, and only then?

Definitions of versions 1 and 1.5 (arXiv 2503.04721, 2507.23159), on the times of both channels:

- A *takeover* is a response of at least 1 s, or of more than 3 words. Anything less is a
  back-channel of the agent.
- *Turn-taking*: takeovers after the user's turns, and from the end of the turn to the response.
- *Pause handling*: takeovers that begin in a pause within the user's turn. Fewer are better.
- *Back-channel* of the user ("okay"): the audible agent still is when it ends, and begins no new
  turn until a second later.
- *Interruption*: takeovers after the interrupting turn, and their latency; whether the audible
  agent is silent within 1.5 s of the interruption's start, and how long that takes.

An event counts in the denominator whether the agent is audible or not, so a silent agent handles
every pause and no back-channel or interruption.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float

from speechlm2_jax.evaluation.metrics.text_metric import by_set
from speechlm2_jax.evaluation.metrics.turn_taking import EARLIEST_S, STOP_S, Turns

TAKEOVER_S = 1.0
MOST_WORDS = 3
"""Of a response that is no takeover."""
QUIET_AFTER_S = 1.0
"""After a back-channel, in which the agent begins no new turn."""
WINDOW_S = 0.02
QUIET_RMS = 0.01
"""A window is silent below -40 dB of full scale."""
BRIDGED_S, LEAST_S = 0.3, 0.1
"""Silences up to the first are part of a stretch of speech; speech below the second is a click."""
_ROUNDING_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class AgentChannel:
    """What the agent does; times are seconds from the start of the conversation."""

    speech: Turns
    """Stretches in which it is audible."""
    turns: Turns
    """Of its text channel."""
    words: Float[np.ndarray, " n"]
    """When each of its words begins."""

    def takeover(self, start_s: float, end_s: float) -> float | None:
        """The beginning of a response that begins in [start_s, end_s) and is one; else None."""
        starts, ends = self.speech.starts, self.speech.ends
        inside = (starts >= start_s - _ROUNDING_S) & (starts < end_s)
        if not inside.any():
            return None
        lasts_s = ends[inside][-1] - starts[inside][0]
        words = int(((self.words >= start_s - _ROUNDING_S) & (self.words < end_s)).sum())
        is_takeover = lasts_s >= TAKEOVER_S - _ROUNDING_S or words > MOST_WORDS
        return float(starts[inside][0]) if is_takeover else None

    def stops_after(self, at_s: float) -> float | None:
        """Seconds for which it is still audible at a time; None if it is silent then."""
        is_audible = (self.speech.starts <= at_s) & (at_s < self.speech.ends)
        return float(self.speech.ends[is_audible][0] - at_s) if is_audible.any() else None


@dataclass(frozen=True, kw_only=True)
class UserChannel:
    """The user's turns and what happens in them: (start, end) in seconds, in order."""

    turns: Sequence[tuple[float, float]]
    pauses: Sequence[tuple[float, float]] = ()
    back_channels: Sequence[tuple[float, float]] = ()
    interruptions: Sequence[tuple[float, float]] = ()
    """Those of the turns that begin in a turn of the agent."""


@dataclass(frozen=True, kw_only=True)
class FullDuplexCounts:
    """Counts of events; can be summed over conversations."""

    turns: int = 0
    takeovers: int = 0
    latencies_s: tuple[float, ...] = ()
    """From the end of a turn to the takeover; 0 if they overlap."""
    pauses: int = 0
    pause_takeovers: int = 0
    back_channels: int = 0
    gone_on: int = 0
    interruptions: int = 0
    interruption_takeovers: int = 0
    interruption_latencies_s: tuple[float, ...] = ()
    stopped: int = 0
    stop_latencies_s: tuple[float, ...] = ()

    def __add__(self, other: "FullDuplexCounts") -> "FullDuplexCounts":
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return FullDuplexCounts(**values)

    def of_silence(self) -> "FullDuplexCounts":
        """The counts of an agent that is silent in the same conversations."""
        return FullDuplexCounts(
            turns=self.turns,
            pauses=self.pauses,
            back_channels=self.back_channels,
            interruptions=self.interruptions,
        )

    def scores(self) -> dict[str, float]:
        """Rates and mean latencies by name; one without events is left out."""
        rates = {
            "takeover_rate": (self.takeovers, self.turns),
            "pause_takeover_rate": (self.pause_takeovers, self.pauses),
            "back_channel_resume_rate": (self.gone_on, self.back_channels),
            "interruption_stop_rate": (self.stopped, self.interruptions),
            "interruption_takeover_rate": (self.interruption_takeovers, self.interruptions),
        }
        latencies = {
            "takeover_latency_s": self.latencies_s,
            "interruption_stop_latency_s": self.stop_latencies_s,
            "interruption_latency_s": self.interruption_latencies_s,
        }
        found = {key: count / total for key, (count, total) in rates.items() if total}
        # fsum: the same in any order, however conversations are split over processes
        means = {key: math.fsum(each) / len(each) for key, each in latencies.items() if each}
        return found | means


def count_events(user: UserChannel, agent: AgentChannel) -> FullDuplexCounts:
    """Compares the two channels of one conversation."""
    interrupting = set(user.interruptions)
    turns = [turn for turn in user.turns if turn not in interrupting]
    starts = sorted(start for start, _ in user.turns)
    latencies = _latencies(turns, starts, agent)
    after = _latencies(user.interruptions, starts, agent)
    stops = [agent.stops_after(start) for start, _ in user.interruptions]
    in_time = [stop for stop in stops if stop is not None and stop <= STOP_S + _ROUNDING_S]
    return FullDuplexCounts(
        turns=len(turns),
        takeovers=len(latencies),
        latencies_s=latencies,
        pauses=len(user.pauses),
        pause_takeovers=sum(agent.takeover(*pause) is not None for pause in user.pauses),
        back_channels=len(user.back_channels),
        gone_on=sum(_goes_on(*one, agent) for one in user.back_channels),
        interruptions=len(user.interruptions),
        interruption_takeovers=len(after),
        interruption_latencies_s=after,
        stopped=len(in_time),
        stop_latencies_s=tuple(in_time),
    )


def _latencies(
    turns: Sequence[tuple[float, float]], starts: Sequence[float], agent: AgentChannel
) -> tuple[float, ...]:
    """Of the takeovers after turns: each before the user's next turn begins."""
    found = []
    for start, end in turns:
        until = next((other for other in starts if other > start), math.inf)
        taken = agent.takeover(max(start, end + EARLIEST_S), until)
        if taken is not None:
            found.append(max(taken - end, 0.0))
    return tuple(found)


def _goes_on(start_s: float, end_s: float, agent: AgentChannel) -> bool:
    left_s = agent.stops_after(start_s)
    begins = agent.turns.starts
    has_new = ((begins > start_s) & (begins <= end_s + QUIET_AFTER_S)).any()
    return left_s is not None and left_s >= end_s - start_s and not has_new


def audible(wave: Float[np.ndarray, " S"], rate_hz: int, delay_s: float = 0.0) -> Turns:
    """The stretches in which samples [S] are audible, as seconds, moved by `delay_s`."""
    size = max(round(WINDOW_S * rate_hz), 1)
    padded = np.pad(np.asarray(wave, np.float32), (0, -len(wave) % size)).reshape(-1, size)
    is_loud = np.sqrt(np.mean(np.square(padded), axis=1)) >= QUIET_RMS
    edges = np.flatnonzero(np.diff(np.pad(is_loud.astype(np.int8), 1)))
    spans: list[tuple[float, float]] = []
    for start, end in (edges.reshape(-1, 2) * size / rate_hz).tolist():
        if spans and start - spans[-1][1] <= BRIDGED_S + _ROUNDING_S:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    kept = [(start, end) for start, end in spans if end - start >= LEAST_S - _ROUNDING_S]
    return Turns.from_segments([(start + delay_s, end + delay_s) for start, end in kept])


class FullDuplex:
    """Scores of all events: `KEY_SET` per data set, and `KEY`, the mean of sets that have it."""

    def __init__(self) -> None:
        self._counts: dict[str, FullDuplexCounts] = {}

    def update(self, name: str, counts: FullDuplexCounts) -> None:
        """Adds one conversation of data set `name`."""
        self._counts[name] = self._counts.get(name, FullDuplexCounts()) + counts

    def compute(self) -> dict[str, float]:
        """All scores by name; empty if nothing was added."""
        sets = {name: counts.scores() for name, counts in self._counts.items()}
        keys = dict.fromkeys(key for scores in sets.values() for key in scores)
        found: dict[str, float] = {}
        for key in keys:
            found |= by_set(
                key, {name: scores[key] for name, scores in sets.items() if key in scores}
            )
        return found
