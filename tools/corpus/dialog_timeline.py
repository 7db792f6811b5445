"""Writes one conversation of the bundled dialogs: who begins when, as a Lhotse cut.

The user's voice is a MixedCut of stretches of recordings; in the custom field `target_audio` is
another one, the agent's. Times are multiples of 10 ms, those of the agent of 80 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from dialog_recordings import FRAME, STEP, Stretch
from synthesis import RATE_HZ

DELAY_FRAMES = 4
"""From the frame in which the user ends to the agent's first one."""
STOP_FRAMES = 7
"""From the user's barge-in to the end of the agent's turn."""
FIRST_S, NEXT_S, LAST_S = (0.2, 1.0), (0.3, 1.2), (0.6, 1.0)
"""Silence before the first question, before the next ones, and at the end."""
PAUSE_S = (0.3, 1.2)
BACK_CHANNEL_S = (0.25, 0.5)
"""After the beginning of the agent's turn."""
SNR_DB = (12.0, 30.0)


@dataclass(frozen=True, kw_only=True)
class Response:
    """The agent's recordings of one text: whole, and stopped after so many frames."""

    text: str
    whole: Stretch
    stopped: dict[int, Stretch]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A user's question: one stretch, or two with a pause between; and the response to it."""

    text: str
    parts: Sequence[Stretch]
    response: Response


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question and what happens while the agent responds."""

    asked: Asked
    is_interrupted: bool = False
    """Whether the next question is a barge-in."""
    back_channel: tuple[str, Stretch] | None = None


@dataclass(frozen=True, kw_only=True)
class _Track:
    stretch: Stretch
    start: int
    text: str = ""
    speech: tuple[int, int] = (0, 0)
    """Begin and end of a turn."""


@dataclass
class Timeline:
    """One conversation, from left to right; times are samples."""

    rng: np.random.Generator
    user: list[_Track] = field(default_factory=list)
    agent: list[_Track] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    clock: int = 0
    """When the user may begin."""

    def write(self, exchanges: Sequence[Exchange]) -> None:
        """Places all turns."""
        self.clock = self._draw(FIRST_S)
        interrupts = False
        for exchange in exchanges:
            end = self._ask(exchange.asked, interrupts)
            interrupts = exchange.is_interrupted
            self._respond(exchange, FRAME * (-(-end // FRAME) + DELAY_FRAMES))
            if not interrupts:
                self.clock += self._draw(NEXT_S)

    def _ask(self, asked: Asked, interrupts: bool) -> int:
        """Places a question, its speech at the clock; returns the end of its speech."""
        first, *others = asked.parts
        begin, end = self.clock, self.clock + first.speech
        starts = [begin - first.lead]
        for part in others:
            pause = self._draw(PAUSE_S)
            self._event("pause", end, end + pause)
            starts.append(end + pause - part.lead)
            end += pause + part.speech
        if interrupts:
            self._event("interruption", begin, end)
        whole = {"text": asked.text, "speech": (begin, end)}
        self.user.append(_Track(stretch=first, start=starts[0], **whole))
        rest = zip(others, starts[1:], strict=True)
        self.user += [_Track(stretch=part, start=start) for part, start in rest]
        return end

    def _respond(self, exchange: Exchange, start: int) -> None:
        response = exchange.asked.response
        stretch = response.whole
        if exchange.is_interrupted:
            frames = int(self.rng.choice(list(response.stopped)))
            stretch = response.stopped[frames]
            # the barge-in begins up to half a frame before or after a frame
            shift = STEP * int(self.rng.integers(-4, 5))
            self.clock = start + (frames - STOP_FRAMES) * FRAME + shift
        end = start + stretch.samples
        self.agent.append(
            _Track(stretch=stretch, start=start, text=response.text, speech=(start, end))
        )
        if exchange.back_channel is not None:
            text, heard = exchange.back_channel
            begin = start + self._draw(BACK_CHANNEL_S)
            self.user.append(_Track(stretch=heard, start=begin - heard.lead))
            self._event("back_channel", begin, begin + heard.speech, text=text)
            end = max(end, begin + heard.speech)
        if not exchange.is_interrupted:
            self.clock = end

    def _event(self, kind: str, start: int, end: int, **fields: Any) -> None:
        times = {"start": start / RATE_HZ, "end": end / RATE_HZ}
        self.events.append({"kind": kind, **times, **fields})

    def _draw(self, seconds: tuple[float, float]) -> int:
        return STEP * round(float(self.rng.uniform(*seconds)) * RATE_HZ / STEP)

    def cut(self, name: str, voice: str, noise: Stretch | None, folder: Path) -> dict[str, Any]:
        """The Lhotse cut as its JSON; paths are relative to the folder."""
        ends = [track.start + track.stretch.samples for track in (*self.user, *self.agent)]
        total = FRAME * -(-(max(ends) + self._draw(LAST_S)) // FRAME)
        agent = self._mixed(f"{name}-agent", "agent", self.agent, total, folder)
        user = self._mixed(name, "user", self.user, total, folder)
        user["tracks"][0]["cut"]["custom"] = {
            "target_audio": agent,
            "events": self.events,
            "voice": voice,
        }
        if noise is not None:
            latest = (noise.samples - total) // FRAME
            start = noise.start + FRAME * int(self.rng.integers(latest + 1))
            behind = Stretch(tape=noise.tape, start=start, samples=total)
            track = _track(f"{name}-noise", "", _Track(stretch=behind, start=0), folder)
            track["snr"] = round(float(self.rng.uniform(*SNR_DB)), 1)
            user["tracks"].append(track)
        return user

    def _mixed(
        self, name: str, speaker: str, tracks: Sequence[_Track], total: int, folder: Path
    ) -> dict[str, Any]:
        from lhotse.cut import MixTrack, PaddingCut

        silence = PaddingCut(
            id=f"{name}-silence",
            duration=total / RATE_HZ,
            sampling_rate=RATE_HZ,
            feat_value=0.0,
            num_samples=total,
        )
        made = [_track(f"{name}-{n}", speaker, one, folder) for n, one in enumerate(tracks)]
        tracks_of_cut = [MixTrack(cut=silence, type="PaddingCut").to_dict(), *made]
        return {"id": name, "tracks": tracks_of_cut, "type": "MixedCut"}


def _track(name: str, speaker: str, track: _Track, folder: Path) -> dict[str, Any]:
    from lhotse import MonoCut, SupervisionSegment
    from lhotse.cut import MixTrack

    recording = track.stretch.tape.recording(folder)
    turns = []
    if track.text:
        begin, end = track.speech
        turns = [
            SupervisionSegment(
                id=name,
                recording_id=recording.id,
                start=(begin - track.start) / RATE_HZ,
                duration=(end - begin) / RATE_HZ,
                text=track.text,
                speaker=speaker,
            )
        ]
    cut = MonoCut(
        id=name,
        start=track.stretch.start / RATE_HZ,
        duration=track.stretch.samples / RATE_HZ,
        channel=0,
        recording=recording,
        supervisions=turns,
    )
    return MixTrack(cut=cut, type="MonoCut", offset=track.start / RATE_HZ).to_dict()
