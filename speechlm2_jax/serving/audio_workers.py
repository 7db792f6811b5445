"""Worker processes that decode audio. One that is killed or hangs is replaced; others go on."""

import asyncio
import logging
import multiprocessing
import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

from speechlm2_jax.serving import audio_worker
from speechlm2_jax.serving.api_errors import ApiError, bad
from speechlm2_jax.serving.audio_worker import DecodedAudio, TooLongAudio, UnusableAudio

log = logging.getLogger(__name__)
TRIES = 2


class AudioWorkers:
    """`count` processes, each with a pool of its own: the end of one touches no other."""

    def __init__(self, count: int, timeout_s: float) -> None:
        self._count, self._timeout_s = count, timeout_s
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self._all: set[_Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.replaced = 0

    async def start(self) -> None:
        """Starts the processes, and returns when they are ready."""
        workers = [_Worker() for _ in range(self._count)]
        for worker in workers:
            self._all.add(worker)
            worker.begin()
        for worker in workers:
            await worker.ready()
            self._free.put_nowait(worker)

    def process_ids(self) -> list[int]:
        """The ids of the processes."""
        return [worker.pid for worker in self._all if worker.pid]

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._all:
            worker.kill()

    async def decode(
        self, data: bytes | str, rate_hz: int, max_s: float, param: str
    ) -> DecodedAudio:
        """Decodes a recording. Raises ApiError if it cannot be used; `param` is its name."""
        decoded = await self._run(data, rate_hz, max_s)
        if isinstance(decoded, UnusableAudio):
            raise bad(f"{param}: {decoded.reason}", param, "invalid_audio")
        if isinstance(decoded, TooLongAudio):
            least = "" if decoded.is_whole else "more than "
            raise ApiError(
                413,
                f"{param}: {least}{decoded.seconds:.0f} s of audio, and the limit is {max_s:g} s",
                param=param,
                code="audio_too_long",
            )
        return decoded

    async def _run(self, data: bytes | str, rate_hz: int, max_s: float) -> audio_worker.Decoded:
        for _ in range(TRIES):
            worker = await self._free.get()
            try:
                decoded = await worker.decode(data, rate_hz, max_s, self._timeout_s)
            except BrokenProcessPool:
                log.warning("audio worker %d ended; it is replaced", worker.pid)
                self._replace(worker)
            except TimeoutError:
                self._replace(worker)
                limit = f"{self._timeout_s:g} s"
                raise bad(f"the audio could not be decoded within {limit}") from None
            except asyncio.CancelledError:
                self._tasks.add(task := asyncio.create_task(self._free_later(worker)))
                task.add_done_callback(self._tasks.discard)
                raise
            except Exception as error:
                log.exception("audio worker %d failed; it is replaced", worker.pid)
                self._replace(worker)
                reason = f"the audio could not be decoded: {type(error).__name__}"
                raise ApiError(500, reason) from error
            else:
                self._free.put_nowait(worker)
                return decoded
        raise ApiError(500, f"the process that decodes the audio ended {TRIES} times; try again")

    async def _free_later(self, worker: "_Worker") -> None:
        """Gives a worker back once it has finished what nobody waits for any more."""
        try:
            await worker.finished(self._timeout_s)
        except Exception:  # noqa: BLE001 - the request that would be told of it is gone
            self._replace(worker)
        else:
            self._free.put_nowait(worker)

    def _replace(self, worker: "_Worker") -> None:
        worker.kill()
        self._all.discard(worker)
        self.replaced += 1
        fresh = _Worker()
        self._all.add(fresh)
        self._free.put_nowait(fresh)
        with suppress(OSError):  # no memory for a process: the next request tries again
            fresh.begin()


class _Worker:
    """One process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
        self._pool = ProcessPoolExecutor(1, mp_context=context)
        self._starting: Future[int] | None = None
        self._call: Future[audio_worker.Decoded] | None = None
        self.pid = 0

    def begin(self) -> Future[int]:
        """Starts the process. Raises OSError if there can be none."""
        if self._starting is None:
            self._starting = self._pool.submit(audio_worker.process_id)
        return self._starting

    async def ready(self) -> None:
        """Returns when the process runs."""
        self.pid = await asyncio.wrap_future(self.begin())

    async def decode(
        self, data: bytes | str, rate_hz: int, max_s: float, timeout_s: float
    ) -> audio_worker.Decoded:
        async with asyncio.timeout(timeout_s):
            if not self.pid:
                await self.ready()
            self._call = self._pool.submit(audio_worker.decode, data, rate_hz, max_s)
            return await asyncio.shield(asyncio.wrap_future(self._call))

    async def finished(self, timeout_s: float) -> None:
        """Waits for what runs here."""
        if self._call is not None and not self._call.cancelled():
            await asyncio.wait_for(asyncio.wrap_future(self._call), timeout_s)

    def kill(self) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._pool.shutdown(wait=False, cancel_futures=True)
