"""Runs the application in uvicorn until a signal ends it."""

import asyncio
import logging
import os
import signal
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from speechlm2_jax.serving.app import make_app
from speechlm2_jax.serving.guard import MAX_HEADER_BYTES, PatientProtocol
from speechlm2_jax.serving.load import load_engine
from speechlm2_jax.serving.model_service import ModelService
from speechlm2_jax.serving.options import ServeOptions, ServerOptions
from speechlm2_jax.serving.service import LoadEngine, Service

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 2048
END_TIMEOUT_S = 5.0


class DrainingServer(uvicorn.Server):
    """uvicorn that finishes what runs on the first signal, and ends on the second.

    Until then it takes connections, and responds 503 to new requests.
    """

    def __init__(self, config: uvicorn.Config, service: ModelService) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGTERM and SIGINT."""
        if self._service.is_draining or not self.started:
            super().handle_exit(sig, frame)
            return
        log.info("%s: finishing %d requests", signal.Signals(sig).name, self._service.active)
        self._service.is_draining = True
        # the handler interrupts the loop, which may be asleep
        asyncio.get_running_loop().call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        self._drain = asyncio.create_task(self._end())

    async def _end(self) -> None:
        await self._service.drain()
        self.should_exit = True


def server_config(service: Service, port: int) -> uvicorn.Config:
    """How uvicorn runs the application of a service."""
    return uvicorn_config(make_app(service), service.options.host, port, ws="none")


def uvicorn_config(app: ASGIApp, host: str, port: int, **sockets: Any) -> uvicorn.Config:
    """How uvicorn runs an application; `sockets` are its settings of WebSockets."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PatientProtocol,
        **sockets,
        log_config=None,
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=5,
    )


def serve(options: ServeOptions, load: LoadEngine = load_engine) -> int:
    """Serves a model until SIGTERM or SIGINT. Returns the exit status of the process."""
    service = Service(options, load)
    return run_service(service, server_config(service, options.port), options, "serve")


def run_service(
    service: ModelService, config: uvicorn.Config, options: ServerOptions, program: str
) -> int:
    """Runs a service until a signal or its fault. Returns the exit status of the process."""
    server = DrainingServer(config, service)

    def end() -> None:
        server.should_exit = True

    service.on_fault = end
    if options.is_open:
        log.warning(
            "--host %s and no key: whoever reaches the address may send requests; give --api-key",
            options.host,
        )
    log.info("serving %s on http://%s:%d", options.model, options.host, options.port)
    server.run()
    code = 0 if service.fault is None else 1
    if code:
        log.error("%s: %s", program, service.fault)
    if not service.has_ended(END_TIMEOUT_S):
        logging.shutdown()
        os._exit(code)  # a thread inside XLA cannot be ended, and the interpreter would abort
    return code
