"""What must hold of a server under the load of `benchmarks.serve`."""

import io
import re
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.serve_load import Recording, with_texts
from speechlm2_jax.data.audio import read_audio

IDLE_TIMEOUT_S = 60.0
WARM_SHARE = 0.25
"""Of the requests: what they use for the first time stays in memory."""
GROWTH_MIB = 64.0


def offline_texts(
    model: str, recordings: Sequence[Recording], max_new_tokens: int
) -> list[Recording]:
    """The recordings with the texts of `model.transcribe`, in fp32, with a server's settings."""
    from speechlm2_jax.models import SALM
    from speechlm2_jax.serving.load import as_trained
    from speechlm2_jax.serving.options import ServeOptions

    options = as_trained(ServeOptions(model=model))
    own = SALM.from_pretrained(model, dtype="float32").eval()
    rate_hz = own.sampling_rate
    waves = [read_audio(io.BytesIO(one.data), sample_rate_hz=rate_hz) for one in recordings]
    texts = own.transcribe(
        waves,
        prompt=options.prompt,
        max_audio_s=options.max_audio_s,
        max_new_tokens=max_new_tokens,
    )
    return with_texts(recordings, texts)


class Server:
    """The server from outside: its metrics, and the memory of its process if `pid` is given."""

    def __init__(self, url: str, pid: int | None = None) -> None:
        self._url, self._pid = url, pid
        self.memory_mib: list[tuple[float, float]] = []
        """(share of the requests, MiB) of the last round."""

    def note_memory(self, share: float) -> None:
        """Takes down the memory of the process and of those that it started."""
        if self._pid is None:
            return
        if self.memory_mib and share < self.memory_mib[-1][0]:
            self.memory_mib.clear()
        self.memory_mib.append((share, sum(map(_resident_mib, _family(self._pid)))))

    def problems(self) -> list[str]:
        """What is wrong after a round: faults, requests that are stuck, memory that grew."""
        found, values = [], self._when_idle()
        for name in ("slots_busy", "queue_length", "faults_total"):
            if values[name]:
                found.append(f"after the load {name} is {values[name]:g}")
        warm = [mib for share, mib in self.memory_mib if share >= WARM_SHARE]
        if warm:
            print(f"         memory {warm[0]:.0f} MiB after a quarter, {warm[-1]:.0f} at the end")
            if warm[-1] > warm[0] + GROWTH_MIB:
                found.append(f"memory grew by more than {GROWTH_MIB:g} MiB")
        return found

    def _when_idle(self) -> dict[str, float]:
        end_s = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            text = httpx.get(f"{self._url}/metrics", timeout=IDLE_TIMEOUT_S).text
            pairs = re.findall(r"^speechlm2_(\w+) (\S+)$", text, re.MULTILINE)
            values = {name: float(value) for name, value in pairs}
            is_idle = not (values["slots_busy"] or values["queue_length"])
            if is_idle or time.monotonic() > end_s:
                return values
            time.sleep(0.2)


def _family(pid: int) -> list[int]:
    """A process and those that it started."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(n for own in children for c in own.read_text().split() for n in _family(int(c)))]


def _resident_mib(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0.0
    found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
