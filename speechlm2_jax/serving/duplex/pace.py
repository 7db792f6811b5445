"""What happens to the user's audio that comes late, in bursts, or too fast.

The user's samples are the clock of a conversation: each frame of them gives one frame of the
agent's. So the client's clock may drift against this machine's, and no buffer grows.

- Nothing came for `stall_s`: silence stands in for it in real time, and the agent goes on.
- The late audio comes at last, in a burst: as much of its oldest samples is dropped as silence
  stood in for, for the conversation would lag behind real time by that much for ever.
- Audio that comes faster than real time without a stall is a recording, not a microphone: nothing
  of it is dropped; the server reads it as fast as it computes. At its end real time begins.
"""

JITTER_S = 0.25
"""Audio may be this much ahead of real time after a stall."""
RECORDING_S = 1.0
"""A client that is this much ahead of real time without a stall sends a recording."""


class InputPace:
    """Compares the user's audio with real time. All times are of one clock, in seconds."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._begun_s: float | None = None
        self._last_s = 0.0
        self._taken_s = self._owed_s = 0.0
        self._is_stalled = False
        self.is_live = True
        """Whether the audio comes in real time, as far as one can tell."""

    def late_s(self, now_s: float, length_s: float) -> float:
        """Takes `length_s` of audio that has just come; returns how much of its start is late."""
        if self._begun_s is None:
            self._begun_s = now_s - length_s
        self._last_s, self._is_stalled = now_s, False
        ahead_s = self._taken_s + length_s - (now_s - self._begun_s)
        drop_s = 0.0
        if self.is_live and self._owed_s > 0:
            drop_s = max(0.0, min(self._owed_s, ahead_s - JITTER_S, length_s))
            self._owed_s -= drop_s
        elif ahead_s > RECORDING_S:
            self.is_live = False
        self._taken_s += length_s - drop_s
        return drop_s

    def missing_s(self, now_s: float, chunk_s: float) -> float:
        """Seconds of silence to add now: `chunk_s` if the audio has stalled and is behind."""
        if self._begun_s is None or now_s - self._last_s < self._stall_s:
            return 0.0
        if not self._is_stalled:
            self._is_stalled = True
            self._owed_s = 0.0  # a pause of the client is no debt of earlier ones
            if not self.is_live:  # after a recording, real time begins at its end
                self._begun_s = self._last_s - self._taken_s
        if now_s - self._begun_s - self._taken_s < chunk_s:
            return 0.0
        self._taken_s += chunk_s
        self._owed_s += chunk_s if self.is_live else 0.0
        return chunk_s

    @property
    def is_stalled(self) -> bool:
        """Whether silence stands in for audio now."""
        return self._is_stalled
