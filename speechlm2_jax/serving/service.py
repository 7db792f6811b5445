"""The state of a server: its model, its device thread, its workers, and who may enter."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.audio_workers import AudioWorkers
from speechlm2_jax.serving.metrics import Metrics
from speechlm2_jax.serving.options import ServeOptions
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:  # JAX takes seconds: it is imported when HTTP is there already
    from speechlm2_jax.inference.engine import Engine
    from speechlm2_jax.serving.alignment import Alignment
    from speechlm2_jax.serving.scheduler import Scheduler

log = logging.getLogger(__name__)
LoadEngine = Callable[[ServeOptions], "Engine"]


class Service:
    """One model behind one address.

    `start` returns at once. The model is loaded and compiled in the device thread, and
    `why_unready` tells how far it is.
    """

    def __init__(self, options: ServeOptions, load: LoadEngine) -> None:
        self.options, self.metrics = options, Metrics()
        self.workers = AudioWorkers(options.audio_workers, options.decode_timeout_s)
        self.scheduler: Scheduler | None = None
        self.engine: Engine | None = None
        self.alignment: Alignment | None = None
        """None: there is no aligner."""
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self.created, self.active = int(time.time()), 0
        self.is_draining = self._is_stopped = False
        self.fault: str | None = None
        """Why the server ends: the model could not be loaded, or the device thread has ended."""
        self.on_fault: Callable[[], None] = lambda: None
        self._load = load
        self._state: str | None = f"loading {options.model}"
        self.seconds_to_ready: float | None = None

    async def start(self) -> None:
        """Starts the device thread and the audio workers."""
        self._thread.start()
        await self.workers.start()

    def stop(self) -> None:
        """Ends the device thread after its present round, and the workers."""
        self._is_stopped = True
        if self.scheduler is not None:
            self.scheduler.stop()
        if self.alignment is not None:
            self.alignment.close()
        self.workers.close()

    def has_ended(self, timeout_s: float) -> bool:
        """Whether the device thread ends within a time; it does not while it compiles."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def why_unready(self) -> str | None:
        """What is still to be done before requests are taken; None: nothing."""
        if self.fault is not None:
            return self.fault
        return "shutting down" if self.is_draining else self._state

    def ready(self) -> "tuple[Engine, Scheduler]":
        """The model. Raises ApiError if it is not ready, or the server is shutting down."""
        why = self.why_unready
        if why is not None or self.engine is None or self.scheduler is None:
            raise ApiError(
                503,
                f"the server is not ready: {why}",
                code="not_ready",
                headers={"Retry-After": "5"},
            )
        return self.engine, self.scheduler

    def check_room(self) -> None:
        """Raises ApiError if the queue is full."""
        most = self.options.slots + self.options.max_queue
        if self.active >= most:
            raise ApiError(
                429,
                f"{self.active} requests are under way, the most that the server takes; try again "
                "later",
                code="queue_full",
                headers={"Retry-After": str(self.metrics.wait_s(self.active, self.options.slots))},
            )

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that run or wait. Raises ApiError if all are taken."""
        self.ready()
        self.check_room()
        self.active += 1
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.finished(time.monotonic() - start_s)

    async def drain(self) -> None:
        """Refuses new requests, and returns when all others have ended, or the time is over."""
        self.is_draining = True
        end_s = time.monotonic() + self.options.drain_timeout_s
        while self.active and time.monotonic() < end_s:
            await asyncio.sleep(0.05)

    def _run(self) -> None:
        """Loads the model and compiles every program; then runs the jobs."""
        start_s, failed = time.monotonic(), "the model could not be loaded"
        try:
            self.engine, self.scheduler = self._prepared()
            self.metrics.watch(self.scheduler.counts, self.options.slots)
            self.seconds_to_ready = time.monotonic() - start_s
            log.info("ready after %.1f s", self.seconds_to_ready)
            self._state, failed = None, "the device thread has ended"
            self.scheduler.run()
        except BaseException as error:  # told by /health and /ready, and ends the server
            if self._is_stopped:  # the loop that its last reports go to may be closed
                return
            if not isinstance(error, SettingsError):
                log.exception(failed)
            self.fault = f"{failed}: {error}" if str(error) else f"{failed}: {error!r}"
            self.on_fault()

    def _prepared(self) -> "tuple[Engine, Scheduler]":
        from speechlm2_jax.serving import chat, transcriptions  # noqa: F401 - they import JAX
        from speechlm2_jax.serving.alignment import Alignment
        from speechlm2_jax.serving.device import DeviceSlots
        from speechlm2_jax.serving.load import as_trained
        from speechlm2_jax.serving.scheduler import Scheduler, SchedulerPace
        from speechlm2_jax.serving.shapes import make_table

        self.options = o = as_trained(self.options)
        engine = self._load(o)
        table = make_table(
            frame_count=engine.frame_count,
            sampling_rate=engine.sampling_rate,
            max_clip_s=o.max_audio_s,
            slots=o.slots,
            new_tokens=o.max_new_tokens,
            prefill_tokens=o.prefill_tokens,
            prompt_tokens=o.max_prompt_tokens,
        )
        device = DeviceSlots(engine=engine, table=table)
        device.compile(self._show)
        self._state = "opening the aligner"
        if (aligner := engine.open_aligner()) is not None:
            self.alignment = Alignment(aligner, engine.sampling_rate, table.clip_samples)
            self.alignment.compile(self._show)
        return engine, Scheduler(device, SchedulerPace(tokens_at_once=o.tokens_at_once))

    def _show(self, name: str) -> None:
        self._state = f"compiling: {name}"
        log.info(self._state)
