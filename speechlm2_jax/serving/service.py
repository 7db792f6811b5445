"""The state of a server: its model, its device thread, its workers, and who may enter."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.audio_workers import AudioWorkers
from speechlm2_jax.serving.metrics import Metrics
from speechlm2_jax.serving.model_service import ModelService
from speechlm2_jax.serving.options import ServeOptions

if TYPE_CHECKING:  # JAX takes seconds: it is imported when HTTP is there already
    from speechlm2_jax.inference.engine import Engine
    from speechlm2_jax.serving.alignment import Alignment
    from speechlm2_jax.serving.scheduler import Scheduler

LoadEngine = Callable[[ServeOptions], "Engine"]


class Service(ModelService):
    """One SALM behind one address, with the workers that decode audio."""

    def __init__(self, options: ServeOptions, load: LoadEngine) -> None:
        super().__init__(options)
        self.options, self.metrics = options, Metrics()
        self.workers = AudioWorkers(options.audio_workers, options.decode_timeout_s)
        self.scheduler: Scheduler | None = None
        self.engine: Engine | None = None
        self.alignment: Alignment | None = None
        """None: there is no aligner."""
        self._load = load

    async def start(self) -> None:
        """Starts the device thread and the audio workers."""
        await super().start()
        await self.workers.start()

    def stop(self) -> None:
        """Ends the device thread after its present round, and the workers."""
        super().stop()
        if self.scheduler is not None:
            self.scheduler.stop()
        if self.alignment is not None:
            self.alignment.close()
        self.workers.close()

    def ready(self) -> "tuple[Engine, Scheduler]":
        """The model. Raises ApiError if it is not ready, or the server is shutting down."""
        self.check_ready()
        assert self.engine is not None and self.scheduler is not None
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

    def prepare(self) -> Callable[[], None]:
        """Loads the model and compiles every program; returns the loop of the scheduler."""
        self.engine, self.scheduler = self._prepared()
        self.metrics.watch(self.scheduler.counts, self.options.slots)
        return self.scheduler.run

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
