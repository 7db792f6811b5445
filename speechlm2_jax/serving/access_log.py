"""One log line per request: method, path, status and seconds; no keys, no contents.

A WebSocket is logged when it has ended, as `WS`, with the code that closed it.
"""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from speechlm2_jax.serving.metrics import CLIENT_GONE

log = logging.getLogger(__name__)
QUIET_PATHS = ("/health", "/ready", "/metrics")
"""Those that programs ask every few seconds."""
MAX_PATH = 200
"""Characters of a path that are shown."""


class AccessLog:
    """Logs each request when its response has been sent, also of one that is refused."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request."""
        if scope["type"] not in ("http", "websocket") or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        start_s, status = time.monotonic(), CLIENT_GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.close":
                status = message.get("code", 1000)
            await send(message)

        async def noting() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "websocket.disconnect":
                status = message.get("code", 1005)
            return message

        try:
            await self._app(scope, noting, noted)
        finally:
            path = scope["path"].encode("unicode_escape").decode()[:MAX_PATH]
            method = scope.get("method", "WS")
            log.info("%s %s %d %.3f s", method, path, status, time.monotonic() - start_s)
