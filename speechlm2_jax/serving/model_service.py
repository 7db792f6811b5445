"""A model in a thread of its own behind one address: how far it is, and how it ends."""

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.options import ServerOptions
from speechlm2_jax.settings import SettingsError

log = logging.getLogger(__name__)


class ModelService(ABC):
    """One model behind one address.

    `start` returns at once. The model is loaded and compiled in the device thread, and
    `why_unready` tells how far it is.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self.created, self.active = int(time.time()), 0
        self.is_draining = self._is_stopped = False
        self.fault: str | None = None
        """Why the server ends: the model could not be loaded, or the device thread has ended."""
        self.on_fault: Callable[[], None] = lambda: None
        self._state: str | None = f"loading {options.model}"
        self._drain_timeout_s = options.drain_timeout_s
        self.seconds_to_ready: float | None = None

    async def start(self) -> None:
        """Starts the device thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the device thread after its present round."""
        self._is_stopped = True

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

    def check_ready(self) -> None:
        """Raises ApiError if the model is not ready, or the server is shutting down."""
        if (why := self.why_unready) is not None:
            raise ApiError(
                503,
                f"the server is not ready: {why}",
                code="not_ready",
                headers={"Retry-After": "5"},
            )

    async def drain(self) -> None:
        """Refuses new requests, and returns when all others have ended, or the time is over."""
        self.is_draining = True
        end_s = time.monotonic() + self._drain_timeout_s
        while self.active and time.monotonic() < end_s:
            await asyncio.sleep(0.05)

    @abstractmethod
    def prepare(self) -> Callable[[], None]:
        """Loads the model and compiles every program; returns what the device thread then runs."""

    def _run(self) -> None:
        start_s, failed = time.monotonic(), "the model could not be loaded"
        try:
            run = self.prepare()
            self.seconds_to_ready = time.monotonic() - start_s
            log.info("ready after %.1f s", self.seconds_to_ready)
            self._state, failed = None, "the device thread has ended"
            run()
        except BaseException as error:  # told by /health and /ready, and ends the server
            if self._is_stopped:  # the loop that its last reports go to may be closed
                return
            if not isinstance(error, SettingsError):
                log.exception(failed)
            self.fault = f"{failed}: {error}" if str(error) else f"{failed}: {error!r}"
            self.on_fault()

    def _show(self, name: str) -> None:
        self._state = f"compiling: {name}"
        log.info(self._state)
