"""Worker processes: whatever one raises, it is replaced, and later requests find a worker."""

import asyncio

import pytest

from speechlm2_jax.serving import audio_workers
from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.audio_worker import UnusableAudio
from speechlm2_jax.serving.audio_workers import AudioWorkers


class FakeWorker:
    """A worker without a process: raises what `faults` has, one after another."""

    faults: list[BaseException] = []
    pid = 1

    def begin(self):
        raise OSError("no memory for a process")

    async def ready(self):
        pass

    async def decode(self, data, rate_hz, max_s, timeout_s):
        if self.faults:
            raise self.faults.pop()
        return UnusableAudio("no audio")

    def kill(self):
        pass


@pytest.mark.parametrize("fault", [MemoryError(), ValueError("odd"), OSError("no process")])
def test_a_worker_that_raises_anything_is_replaced(fault, monkeypatch):
    monkeypatch.setattr(audio_workers, "_Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "faults", [fault, fault])

    async def decode_often():
        workers = AudioWorkers(1, 1.0)
        workers._free.put_nowait(FakeWorker())
        for status in (500, 500, 400):
            with pytest.raises(ApiError) as told:
                await asyncio.wait_for(workers.decode(b"", 16000, 1.0, "file"), 5)
            assert told.value.status == status
        assert workers.replaced == 2

    asyncio.run(decode_often())
