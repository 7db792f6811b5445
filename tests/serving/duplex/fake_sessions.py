"""Sessions without a model: the agent's frames are made of the user's samples.

A frame's audio is the user's of that frame, halved. Where the user is loud after silence the agent
begins a turn with the first loud frame, which ends with the first quiet one; its text counts.
"""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.duplex.server import server_config
from speechlm2_jax.serving.duplex.service import ConversationService
from speechlm2_jax.serving.duplex.sessions import SessionEndedError, SessionFacts
from speechlm2_jax.serving.server import DrainingServer

PAD, BOS, EOS, WORD = 0, 1, 2, 9
HZ, CHUNK = 16000, 1280
FRAME_S = CHUNK / HZ
LOUD = 0.02
WAIT_S = 90.0
"""For what must happen; a busy machine takes long."""
OPTIONS = ConversationOptions(
    model="runs/fake", max_sessions=3, port=1, stall_s=600.0, idle_timeout_s=600.0
)
"""Without silence that stands in for late audio: tests may run slower than real time."""


@dataclass(frozen=True, kw_only=True)
class FakeFrame:
    """The fields of a DuplexFrame that the server reads; JAX need not be imported."""

    text_token: int
    text: str
    audio: np.ndarray
    is_in_turn: bool
    start_s: float
    end_s: float


class FakeSessions:
    """Counts what is open; `delay_s` is the time that a round takes, `most` its frames."""

    def __init__(self, delay_s=0.0, most=None):
        self.facts = SessionFacts(
            input_hz=HZ,
            output_hz=24000,
            chunk_samples=CHUNK,
            frame_s=FRAME_S,
            bos=BOS,
            eos=EOS,
            latency_s=0.0,
        )
        self.delay_s, self.most = delay_s, most
        self.open_now, self.opened, self.interrupted = {}, 0, 0

    def open(self):
        if self.most == 0:
            raise SessionEndedError("the device has no time", is_refused=True)
        number = self.opened
        self.opened += 1
        self.open_now[number] = {"frames": 0, "is_in_turn": False, "is_interrupted": False}
        return number

    def close(self, session):
        del self.open_now[session]

    def interrupt(self, session):
        self.interrupted += 1
        self.open_now[session]["is_interrupted"] = True

    def step(self, chunks):
        time.sleep(self.delay_s)
        return {number: self._frames(number, chunk) for number, chunk in chunks.items()}

    def _frames(self, number, chunk):
        own = self.open_now[number]
        if self.most is not None and own["frames"] >= self.most:
            return SessionEndedError(f"no more than {self.most} frames")
        is_loud, was_in_turn = np.abs(chunk).max() > LOUD, own["is_in_turn"]
        token = (WORD if is_loud else EOS) if was_in_turn else (BOS if is_loud else PAD)
        own["is_in_turn"] = token in (BOS, WORD)
        index = own["frames"]
        own["frames"] += 1
        audio = np.interp(np.arange(1920) * 2 / 3, np.arange(CHUNK), chunk).astype(np.float32)
        return [
            FakeFrame(
                text_token=token,
                text=f"{index} " if token == WORD else "",
                audio=audio / 2,
                is_in_turn=own["is_in_turn"],
                start_s=index * FRAME_S,
                end_s=(index + 1) * FRAME_S,
            )
        ]


class RunningServer:
    """A server in a thread of the test process: its address and its service."""

    def __init__(self, service, port, server):
        self.service, self.port, self.server = service, port, server
        self.http, self.ws = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"
        self.thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)

    def metric(self, name, **labels):
        """The value of a metric, 0 if it was never counted."""
        return self.service.metrics.registry.get_sample_value(f"speechlm2_{name}", labels) or 0

    def until(self, is_true, limit_s=WAIT_S):
        """Waits for something to become true."""
        end_s = time.monotonic() + limit_s
        while not is_true():
            assert time.monotonic() < end_s, "never true"
            time.sleep(0.01)


@contextmanager
def running(sessions, **changes):
    """Runs a server of sessions on a free port until the block ends."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    service = ConversationService(replace(OPTIONS, port=port, **changes), lambda options: sessions)
    own = RunningServer(service, port, DrainingServer(server_config(service, port), service))
    own.thread.start()
    try:
        own.until(lambda: own.server.started and service.why_unready is None, 300)
        yield own
    finally:
        own.server.should_exit = True
        own.thread.join(20)


def tone(seconds, rate_hz=24000, level=0.3, hz=440):
    """A tone [S]."""
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(
        np.float32
    )


def quiet(seconds, rate_hz=24000):
    """Silence [S]."""
    return np.zeros(round(seconds * rate_hz), np.float32)
