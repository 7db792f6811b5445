"""A server of a tiny model in a thread of the test process, on a free port of this machine."""

import asyncio
import io
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from speechlm2_jax.inference.timestamps.aligner import AlignedLabels
from speechlm2_jax.inference.timestamps.bounds import CTC_TIMING, TimedLabel
from speechlm2_jax.models import SALM
from speechlm2_jax.serving.options import ServeOptions
from speechlm2_jax.serving.server import DrainingServer, server_config
from speechlm2_jax.serving.service import Service

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "salm" / "llama_adapter_hf"
OPTIONS = ServeOptions(
    model=str(MODEL),
    name="tiny",
    prompt="Repeat after me:",
    slots=3,
    max_queue=40,
    max_new_tokens=12,
    max_audio_s=0.5,
    max_prompt_tokens=64,
    prefill_tokens=32,
    audio_workers=1,
)
WAVE = soundfile.read(DATA / "salm" / "audio" / "a0.wav", dtype="float32")[0]
RATE_HZ = 16000


def load_tiny():
    return SALM.from_pretrained(MODEL).eval()


def recording(number, samples=7000):
    """Different samples for every number."""
    return np.roll(WAVE, 997 * number)[:samples]


def wav_bytes(samples):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE_HZ, format="WAV", subtype="FLOAT")
    return file.getvalue()


class EvenAligner:
    """Divides a recording evenly among the words of its text."""

    sampling_rate, frame_s, timing = RATE_HZ, 0.08, CTC_TIMING

    def align(self, waves, words):
        return [self._evenly(len(w) / RATE_HZ, own) for w, own in zip(waves, words, strict=True)]

    def _evenly(self, seconds, words):
        edges = np.linspace(0, seconds, len(words) + 1)
        spans = zip(edges[:-1], edges[1:], strict=True)
        labels = [TimedLabel(n, len(words[n]), span) for n, span in enumerate(spans)]
        return AlignedLabels(tuple(labels), (-0.1,) * len(labels), -0.1)


class Running:
    """A server that runs: its address, its service, and the thread and loop it runs in."""

    def __init__(self, service, port, server):
        self.service, self.url, self.server = service, f"http://127.0.0.1:{port}", server
        self.loop = None
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        await self.server.serve()


@contextmanager
def running(model, *, aligner=None, **changes):
    """Runs a server until the block ends."""
    engine = replace(model.engine(), open_aligner=lambda: aligner)
    service = Service(replace(OPTIONS, **changes), lambda options: engine)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    own = Running(service, port, DrainingServer(server_config(service, port), service))
    own.thread.start()
    try:
        end_s = time.monotonic() + 300
        while service.why_unready is not None or not own.server.started:
            assert service.fault is None, service.fault
            assert time.monotonic() < end_s and own.thread.is_alive()
            time.sleep(0.02)
        yield own
    finally:
        own.server.should_exit = True
        own.thread.join(20)
