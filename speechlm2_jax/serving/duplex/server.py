"""Runs a server of conversations in uvicorn until a signal ends it."""

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from speechlm2_jax.serving.duplex.app import make_app
from speechlm2_jax.serving.duplex.load import open_sessions
from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.duplex.service import ConversationService, OpenSessions
from speechlm2_jax.serving.server import run_service, uvicorn_config

READ_TIMEOUT_S = 20.0
"""To read what waits to be sent; then the connection is cut."""


class PatientSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, which cuts off a client that does not read."""

    _stalled: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Begins to wait for a client that does not read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._forget_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._forget_stall()
        super().connection_lost(exc)

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def server_config(service: ConversationService, port: int) -> uvicorn.Config:
    """How uvicorn runs the application of a service."""
    options = service.options
    sockets: dict[str, Any] = {
        "ws": PatientSocket,
        "ws_max_size": options.max_message_bytes,
        # no pings: replies would wait behind a recording that is read as fast as it is computed;
        # a client that is gone sends no audio, and is closed for that
        "ws_ping_interval": None,
        "ws_per_message_deflate": False,  # audio does not shrink, and waits for the compressor
    }
    return uvicorn_config(make_app(service), options.host, port, **sockets)


def serve(options: ConversationOptions, load: OpenSessions = open_sessions) -> int:
    """Serves a model until SIGTERM or SIGINT. Returns the exit status of the process."""
    service = ConversationService(options, load)
    return run_service(service, server_config(service, options.port), options, "talk")
