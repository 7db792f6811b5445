"""Streamed responses: server-sent events that end with `[DONE]`."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.service import Service

log = logging.getLogger(__name__)
Events = AsyncGenerator[Mapping[str, Any], None]


class EventStream(StreamingResponse):
    """Sends events as they come. An error after the first of them becomes an event.

    A full queue is 429, as no status has been sent then. If the client leaves, the events are
    closed, and their slot becomes free.
    """

    def __init__(self, service: Service, events: Events) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(), media_type="text/event-stream", headers=headers)
        self._service, self._events = service, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the whole stream."""
        try:
            with self._service.place():
                await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()

    async def _lines(self) -> AsyncIterator[str]:
        limit_s = self._service.options.request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                async for event in self._events:
                    yield _line(event)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _line(error.body())
        except TimeoutError:
            error = ApiError(504, f"no response within {limit_s:g} s", code="timeout")
            yield _line(error.body())
        except Exception as error:  # noqa: BLE001 - the status has been sent
            log.exception("a stream failed")
            yield _line(ApiError(500, f"{type(error).__name__}: {error}").body())


def _line(event: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
