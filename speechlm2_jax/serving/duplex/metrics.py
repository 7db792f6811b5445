"""What a server of conversations counts, in Prometheus' format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FRAME_S = (0.002, 0.004, 0.008, 0.016, 0.024, 0.032, 0.048, 0.064, 0.08, 0.128, 0.256, 0.512, 1.0)
LENGTHS_S = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0)


class ConversationMetrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "speechlm2", "registry": self.registry}
        frames = {"buckets": FRAME_S, **own}
        self.compute_s = Histogram(
            "frame_compute_seconds", "Computation of a round of chunks", **frames
        )
        self.queue_s = Histogram(
            "frame_queue_seconds", "From a chunk's last sample to its computation", **frames
        )
        self.interval_s = Histogram(
            "frame_interval_seconds", "Between two chunks of a conversation, as sent", **frames
        )
        self.response_s = Histogram(
            "frame_response_seconds", "From a chunk's last sample to the agent's sent", **frames
        )
        self.length_s = Histogram(
            "conversation_seconds", "Conversations that ended", buckets=LENGTHS_S, **own
        )
        self.closed = Counter(
            "conversations_closed", "Conversations by their close code", ["protocol", "code"], **own
        )
        self.refused = Counter("connections_refused", "Refused connections", ["reason"], **own)
        self.frames = Counter("frames", "Frames of the agent", **own)
        self.dropped_s = Counter(
            "audio_dropped_seconds", "Audio that was dropped", ["side", "reason"], **own
        )
        self.filled_s = Counter(
            "audio_filled_seconds", "Silence in place of the user's audio that was late", **own
        )
        self.stalls = Counter("audio_stalls", "Times at which the user's audio was late", **own)
        self.bad_messages = Counter("bad_messages", "Messages that were not understood", **own)
        self._active = Gauge("conversations", "Conversations under way", **own)
        self._most = Gauge("conversations_limit", "Most conversations at once", **own)

    def watch(self, active: Callable[[], int], most: int) -> None:
        """Reads the number of conversations from now on."""
        self._active.set_function(active)
        self._most.set(most)

    def text(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)
