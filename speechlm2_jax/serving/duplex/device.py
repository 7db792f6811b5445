"""The device thread: it computes the chunks of all conversations, one of each in a round."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from speechlm2_jax.serving.duplex.sessions import SessionEndedError, Sessions

if TYPE_CHECKING:
    from speechlm2_jax.inference.sessions.conversation import DuplexFrame


@dataclass(frozen=True, kw_only=True)
class QueuedAudio:
    """The user's samples that are computed together."""

    samples: "Float[np.ndarray, ' S']"
    arrived_s: float
    """When the last of them arrived, by `time.perf_counter`."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a chunk gave."""

    frames: "list[DuplexFrame]"
    arrived_s: float
    """When the last sample of the chunk arrived."""
    queue_s: float
    """From then to the start of its computation."""
    compute_s: float
    """Of the round that the chunk was in."""


Deliver = Callable[[Computed | SessionEndedError], None]


class DeviceLine:
    """A conversation's connection to the device thread. The event loop calls its methods."""

    def __init__(self, loop: "DeviceLoop", deliver: Deliver) -> None:
        self._loop, self.deliver = loop, deliver
        self.chunks: deque[QueuedAudio] = deque()
        self.session: int | None = None
        self.is_interrupted = self.is_reset = self.is_closed = False

    def push(self, chunk: QueuedAudio) -> None:
        """Adds a chunk to those that wait."""
        with self._loop.changed:
            self.chunks.append(chunk)
            self._loop.changed.notify()

    def drop_oldest(self) -> int:
        """Drops the chunk that waits for the longest time; returns its number of samples."""
        with self._loop.changed:
            return len(self.chunks.popleft().samples) if self.chunks else 0

    def interrupt(self) -> None:
        """Ends the agent's turn before the next chunk that is computed."""
        self.is_interrupted = True

    def reset(self) -> None:
        """Drops what waits, and starts another conversation."""
        with self._loop.changed:
            self.chunks.clear()
            self.is_reset = True
            self._loop.changed.notify()

    def close(self) -> None:
        """Ends the conversation; nothing is delivered any more after the present round."""
        with self._loop.changed:
            self.chunks.clear()
            self.is_closed = True
            self._loop.changed.notify()


class DeviceLoop:
    """Rounds of chunks. `run` is the body of the device thread; `open` is called elsewhere."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.changed = threading.Condition()
        """Held while lines and their chunks are read or changed."""
        self._lines: list[DeviceLine] = []
        self._is_stopped = False

    @property
    def lines(self) -> int:
        """Open conversations, with those that are about to be closed."""
        return len(self._lines)

    def open(self, deliver: Deliver) -> DeviceLine:
        """Opens a conversation. `deliver` is called in the device thread."""
        line = DeviceLine(self, deliver)
        with self.changed:
            self._lines.append(line)
        return line

    def stop(self) -> None:
        """Ends `run` after the present round."""
        with self.changed:
            self._is_stopped = True
            self.changed.notify()

    def run(self) -> None:
        """Computes rounds until `stop`."""
        while True:
            with self.changed:
                self.changed.wait_for(self._has_work)
                if self._is_stopped:
                    return
                ended = [line for line in self._lines if line.is_closed or line.is_reset]
                self._lines = [line for line in self._lines if not line.is_closed]
                ready = [(line, line.chunks.popleft()) for line in self._lines if line.chunks]
                for line in ended:
                    line.is_reset = False
            self._end(ended)
            if ready:
                self._compute(ready)

    def _has_work(self) -> bool:
        any_work = any(line.chunks or line.is_closed or line.is_reset for line in self._lines)
        return self._is_stopped or any_work

    def _end(self, lines: list[DeviceLine]) -> None:
        for line in lines:
            if line.session is not None:
                self._sessions.close(line.session)
                line.session = None

    def _compute(self, ready: list[tuple[DeviceLine, QueuedAudio]]) -> None:
        begun_s = time.perf_counter()
        chunks = {line.session: own.samples for line, own in ready if self._begin(line)}
        found = self._sessions.step({n: own for n, own in chunks.items() if n is not None})
        compute_s = time.perf_counter() - begun_s
        for line, own in ready:
            if line.is_closed or line.session is None:
                continue
            frames = found[line.session]
            if isinstance(frames, SessionEndedError):
                line.deliver(frames)
                continue
            line.deliver(
                Computed(
                    frames=frames,
                    arrived_s=own.arrived_s,
                    queue_s=begun_s - own.arrived_s,
                    compute_s=compute_s,
                )
            )

    def _begin(self, line: DeviceLine) -> bool:
        """Opens the session of a line and interrupts it, if need be. False: there is no room."""
        try:
            if line.session is None:
                line.session = self._sessions.open()
        except SessionEndedError as error:
            line.deliver(error)
            return False
        if line.is_interrupted:
            line.is_interrupted = False
            self._sessions.interrupt(line.session)
        return True
