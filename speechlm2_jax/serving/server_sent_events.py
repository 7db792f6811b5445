"""Streamed responses: server-sent events that end with `[DONE]`."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.metrics import CLIENT_GONE
from speechlm2_jax.serving.service import Service

log = logging.getLogger(__name__)
Events = AsyncGenerator[Mapping[str, Any], None]


class EventStream(StreamingResponse):
    """Sends events as they come. An error after the first of them becomes an event.

    If the client leaves, the events are closed, and their slot becomes free.
    """

    def __init__(self, service: Service, events: Events) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(), media_type="text/event-stream", headers=headers)
        self._limit_s, self._events = service.options.request_timeout_s, events
        self._end_s: float | None = None
        self._place = ExitStack()
        self._status = CLIENT_GONE  # unless the stream ends by itself
        self.on_end: Callable[[int], object] = lambda status: None
        """Called once with the status of the whole stream, also of an error within it."""

    def keep(self, place: ExitStack, end_s: float) -> None:
        """Takes a place, to leave it after the stream, at the latest at `end_s` of the loop."""
        self._place, self._end_s = place, end_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the whole stream."""
        try:
            with self._place:
                try:
                    await super().__call__(scope, receive, send)
                finally:
                    await self._events.aclose()
        finally:
            self.on_end(self._status)

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout_at(self._end_s):
                async for event in self._events:
                    yield _line(event)
            self._status = 200
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield self._failed(error)
        except TimeoutError:
            reason = f"no response within {self._limit_s:g} s"
            yield self._failed(ApiError(504, reason, code="timeout"))
        except Exception as error:  # noqa: BLE001 - the status has been sent
            log.exception("a stream failed")
            yield self._failed(ApiError(500, f"{type(error).__name__}: {error}"))

    def _failed(self, error: ApiError) -> str:
        self._status = error.status
        return _line(error.body())


def _line(event: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
