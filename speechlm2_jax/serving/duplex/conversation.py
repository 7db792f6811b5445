"""One conversation of a connection: the user's audio in, the agent's frames out."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.stream_resampler import StreamResampler
from speechlm2_jax.serving.duplex.device import Computed, DeviceLoop, QueuedAudio
from speechlm2_jax.serving.duplex.metrics import ConversationMetrics
from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.duplex.pace import InputPace
from speechlm2_jax.serving.duplex.sessions import SessionEndedError, SessionFacts

if TYPE_CHECKING:
    from speechlm2_jax.inference.sessions.conversation import DuplexFrame

AGENT_HZ = 24_000
"""Rate of the agent's audio in both protocols."""


@dataclass(frozen=True, kw_only=True)
class AgentChunk:
    """The agent's side of one chunk, as it is sent."""

    frames: "list[DuplexFrame]"
    audio: "Float[np.ndarray, ' A']"
    """At AGENT_HZ, of all frames; empty where it was dropped."""
    computed: Computed


class BufferedConversation:
    """Bounded buffers between a connection and the device thread; used from the event loop."""

    def __init__(
        self,
        device: DeviceLoop,
        facts: SessionFacts,
        options: ConversationOptions,
        metrics: ConversationMetrics,
        user_hz: int,
    ) -> None:
        self.facts, self._user_hz = facts, user_hz
        self._options, self._metrics = options, metrics
        self._loop = asyncio.get_running_loop()
        self._line = device.open(self._deliver)
        self._pace = InputPace(options.stall_s)
        self._input = StreamResampler(user_hz, facts.input_hz)
        self._output = StreamResampler(facts.output_hz, AGENT_HZ)
        # without these a chunk would wait for the packet after its last one
        ahead = np.zeros(round(self._input.delay_s * user_hz), np.float32)
        self._held = self._input.push(ahead)
        self._unsent: deque[AgentChunk] = deque()
        self._changed = asyncio.Event()
        self._ended: SessionEndedError | None = None
        self._sent_s: float | None = None
        self._last_audio_s = time.perf_counter()

    # The user's side -------------------------------------------------------------------------

    async def push(self, samples: "Float[np.ndarray, ' S']") -> None:
        """Takes the user's samples at `user_hz`. Of a recording, it waits until there is room."""
        now_s, length_s = time.perf_counter(), len(samples) / self._user_hz
        self._last_audio_s = now_s
        late_s = self._pace.late_s(now_s, length_s)
        if late_s:
            self._metrics.dropped_s.labels("user", "late").inc(late_s)
            samples = samples[round(late_s * self._user_hz) :]
        self._take(self._input.push(samples), now_s)
        while not self._pace.is_live and not self._has_room() and self._ended is None:
            self._changed.clear()
            await self._changed.wait()
        self._drop_oldest()

    def fill(self) -> None:
        """Adds silence where the user's audio is missing; to be called every few milliseconds."""
        now_s = time.perf_counter()
        if self._line.chunks:
            return
        was_stalled = self._pace.is_stalled
        missing_s = self._pace.missing_s(now_s, self.facts.chunk_s)
        if self._pace.is_stalled and not was_stalled:
            self._metrics.stalls.inc()
        if missing_s:
            self._metrics.filled_s.inc(missing_s)
            silence = np.zeros(round(missing_s * self._user_hz), np.float32)
            self._take(self._input.push(silence), now_s)

    @property
    def idle_s(self) -> float:
        """Seconds since audio of the user came or was computed, or since the start."""
        now_s = time.perf_counter()
        if self._line.chunks:
            self._last_audio_s = now_s
        return now_s - self._last_audio_s

    def interrupt(self) -> None:
        """Ends the agent's turn as of the next chunk."""
        self._line.interrupt()

    def reset(self) -> None:
        """Starts another conversation on the same connection."""
        self._line.reset()
        self._held = self._held[:0]
        self._unsent.clear()

    def close(self) -> None:
        """Ends the conversation and frees its place."""
        self._line.close()
        self._unsent.clear()

    def _take(self, samples: "Float[np.ndarray, ' S']", now_s: float) -> None:
        size = self.facts.chunk_samples
        held = np.concatenate([self._held, samples])
        whole = len(held) // size * size
        for start in range(0, whole, size):
            self._line.push(QueuedAudio(samples=held[start : start + size], arrived_s=now_s))
        self._held = held[whole:]

    def _has_room(self) -> bool:
        waiting_s = len(self._line.chunks) * self.facts.chunk_s
        return waiting_s <= self._options.max_backlog_s and (
            self._unsent_s() <= self._options.max_unsent_s
        )

    def _drop_oldest(self) -> None:
        """Drops what a live user's audio has too much of: the device is too slow."""
        if not self._pace.is_live:
            return
        while len(self._line.chunks) * self.facts.chunk_s > self._options.max_backlog_s:
            dropped = self._line.drop_oldest()
            self._metrics.dropped_s.labels("user", "overload").inc(dropped / self.facts.input_hz)

    # The agent's side ------------------------------------------------------------------------

    async def next(self) -> AgentChunk:
        """The agent's next chunk. Raises SessionEndedError for a session that takes no more."""
        while not self._unsent:
            if self._ended is not None:
                raise self._ended
            self._changed.clear()
            await self._changed.wait()
        chunk = self._unsent.popleft()
        self._changed.set()
        return chunk

    def sent(self, chunk: AgentChunk) -> None:
        """Counts a chunk that has just been sent."""
        now_s, computed, metrics = time.perf_counter(), chunk.computed, self._metrics
        metrics.frames.inc(len(chunk.frames))
        metrics.compute_s.observe(computed.compute_s)
        metrics.queue_s.observe(computed.queue_s)
        metrics.response_s.observe(now_s - computed.arrived_s)
        if self._sent_s is not None:
            metrics.interval_s.observe(now_s - self._sent_s)
        self._sent_s = now_s

    def _deliver(self, found: Computed | SessionEndedError) -> None:
        """Called in the device thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, found)
        except RuntimeError:  # the loop has ended
            return

    def _receive(self, found: Computed | SessionEndedError) -> None:
        if isinstance(found, SessionEndedError):
            self._ended = found
        elif not self._line.is_closed:
            audio = [frame.audio for frame in found.frames]
            wave = np.concatenate(audio) if audio else np.zeros(0, np.float32)
            chunk = AgentChunk(frames=found.frames, audio=self._output.push(wave), computed=found)
            self._unsent.append(chunk)
            if self._pace.is_live and self._unsent_s() > self._options.max_unsent_s:
                self._drop_unsent()
        self._changed.set()

    def _unsent_s(self) -> float:
        return sum(len(chunk.audio) for chunk in self._unsent) / AGENT_HZ

    def _drop_unsent(self) -> None:
        """Drops the oldest audio, not its text: the client does not read."""
        for i, chunk in enumerate(self._unsent):
            if len(chunk.audio):
                self._metrics.dropped_s.labels("agent", "unread").inc(len(chunk.audio) / AGENT_HZ)
                self._unsent[i] = AgentChunk(
                    frames=chunk.frames, audio=chunk.audio[:0], computed=chunk.computed
                )
                return
