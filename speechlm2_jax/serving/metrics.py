"""What a server counts, in Prometheus' format."""

import math
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from speechlm2_jax.serving.jobs import SchedulerCounts

SECONDS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60.0, 120.0)
TIMES_REAL = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
INTERVALS_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024)
SMOOTHING = 0.1
CLIENT_GONE = 499
"""The status that is counted where the client left; nobody receives it."""


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "speechlm2", "registry": self.registry}
        self.requests = Counter("requests", "Requests", ["endpoint", "status"], **own)
        self.first_token_s = Histogram(
            "time_to_first_token_seconds", "Body read to the first text of a stream",
            buckets=SECONDS, **own,
        )  # fmt: skip
        self.request_s = Histogram(
            "request_seconds", "Body read to end of response", ["endpoint"], buckets=SECONDS, **own
        )
        self.interval_s = Histogram(
            "token_interval_seconds", "Between reports of one response, per token",
            buckets=INTERVALS_S, **own,
        )  # fmt: skip
        self.rtfx = Histogram(
            "rtfx", "Seconds of audio per second of a request", buckets=TIMES_REAL, **own
        )
        self.audio_s = Counter("audio_seconds", "Seconds of audio of finished requests", **own)
        self._gauges = {
            name: Gauge(name, text, **own)
            for name, text in (
                ("slots", "Slots"),
                ("slots_busy", "Slots in use"),
                ("queue_length", "Sequences that wait for a slot"),
                ("tokens_total", "Generated tokens"),
                ("decode_calls_total", "Calls of the decoding program"),
                ("slots_occupied_total", "Sum of occupied slots over these calls"),
                ("clips_encoded_total", "Encoded clips"),
                ("clips_reused_total", "Clips whose frames were kept from an earlier request"),
                ("faults_total", "Faults of the device thread"),
            )
        }
        self._usual_s = 1.0

    def watch(self, counts: SchedulerCounts, slots: int) -> None:
        """Reads the counts of a scheduler from now on."""
        gauges = self._gauges
        gauges["slots"].set(slots)
        gauges["slots_busy"].set_function(lambda: counts.running)
        gauges["queue_length"].set_function(lambda: counts.waiting)
        gauges["tokens_total"].set_function(lambda: counts.tokens)
        gauges["decode_calls_total"].set_function(lambda: counts.steps)
        gauges["slots_occupied_total"].set_function(lambda: counts.occupied)
        gauges["clips_encoded_total"].set_function(lambda: counts.encoded_clips)
        gauges["clips_reused_total"].set_function(lambda: counts.reused_clips)
        gauges["faults_total"].set_function(lambda: counts.faults)

    def count_audio(self, audio_s: float, taken_s: float) -> None:
        """Counts the audio of a response."""
        self.audio_s.inc(audio_s)
        if audio_s and taken_s > 0:
            self.rtfx.observe(audio_s / taken_s)

    def finished(self, seconds: float) -> None:
        """Counts a request that has ended."""
        self._usual_s += SMOOTHING * (seconds - self._usual_s)

    def wait_s(self, active: int, slots: int) -> int:
        """Whole seconds after which a place should be free."""
        return max(1, math.ceil(self._usual_s * (active - slots + 1) / max(active, 1)))

    def text(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)


@dataclass
class RequestCount:
    """Counts one request when it has ended; its time begins when its body has been read."""

    metrics: Metrics
    endpoint: str
    start_s: float = field(default_factory=time.monotonic)

    def body_read(self) -> float:
        """The time of the call, from which the request is timed."""
        self.start_s = time.monotonic()
        return self.start_s

    def ended(self, status: int) -> None:
        """Counts the request by its status; one of 200 is timed."""
        self.metrics.requests.labels(self.endpoint, str(status)).inc()
        if status == 200:
            taken_s = time.monotonic() - self.start_s
            self.metrics.request_s.labels(self.endpoint).observe(taken_s)
