"""One log line per request: method, path, status and seconds; no keys, no contents."""

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
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        start_s, status = time.monotonic(), CLIENT_GONE

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            path = scope["path"].encode("unicode_escape").decode()[:MAX_PATH]
            log.info("%s %s %d %.3f s", scope["method"], path, status, time.monotonic() - start_s)
