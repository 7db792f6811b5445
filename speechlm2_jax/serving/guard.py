"""What stands before every request: keys, sizes and times."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.options import MIB, ServerOptions

T = TypeVar("T")
MAX_HEADER_BYTES = 64 * 1024
"""Of all headers of a request, with the four bytes between and after a name and a value."""
HEADER_TIMEOUT_S = 15.0
"""To send the headers of a request, or the rest of one that got its response early."""

READ_TIMEOUT_S = 60.0
"""To read the bytes of a response that are waiting to be sent."""


class ClientGoneError(Exception):
    """The client closed the connection before it had its response."""


class Guard:
    """Checks the key of a request, and limits the size and the time of its body."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request, or responds with the reason why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body_end = asyncio.Event()
        scope.setdefault("state", {})["body_end"] = body_end
        try:
            _check_headers(scope["headers"])
            if scope["path"].startswith("/v1"):
                check_key(headers.get(b"authorization", b""), self._options.api_keys)
            self._check_size(int(headers.get(b"content-length", b"0") or 0))
        except ValueError:
            await ApiError(400, "content-length: not a number").response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive, body_end), send)

    def _limited(self, receive: Receive, body_end: asyncio.Event) -> Receive:
        end_s, size = time.monotonic() + self._options.body_timeout_s, 0

        async def limited() -> Message:
            nonlocal size
            if body_end.is_set():
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(end_s - time.monotonic(), 0.0))
            except TimeoutError:
                limit = f"{self._options.body_timeout_s:g} s"
                raise ApiError(408, f"the request was not sent within {limit}") from None
            size += len(message.get("body", b""))
            self._check_size(size)
            if not message.get("more_body", False):
                body_end.set()
            return message

        return limited

    def _check_size(self, size: int) -> None:
        most = self._options.max_body_bytes
        if size > most:  # the rest is dropped: a client that is cut off may not see its response
            raise ApiError(
                413,
                f"the request is larger than {most / MIB:g} MiB",
                code="request_too_large",
            )


def _check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Raises ApiError for too many: h11 limits only what has not come whole."""
    if sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEADER_BYTES:
        raise ApiError(431, f"the headers are larger than {MAX_HEADER_BYTES // 1024} KiB")


def check_key(authorization: bytes, keys: Sequence[str]) -> None:
    """Raises ApiError unless a header has one of the keys, or none is needed.

    Takes the same time whichever key is compared, and wherever it differs.
    """
    if not keys:
        return
    kind, _, given = authorization.partition(b" ")
    found = [hmac.compare_digest(given.strip(), key.encode()) for key in keys]
    if kind.lower() != b"bearer" or not any(found):
        raise ApiError(
            401,
            "the API key is missing or wrong; send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def unless_gone(request: Request, work: Awaitable[T], timeout_s: float) -> T:
    """Awaits `work`, which reads the body of a request and finds its response.

    Cancels it if the client leaves (ClientGoneError), or after `timeout_s` (ApiError 504).
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
        raise ApiError(504, f"no response within {timeout_s:g} s", code="timeout")
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    await request.state.body_end.wait()  # what reads the body notices it until then
    while (await request.receive())["type"] != "http.disconnect":
        pass


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a limit on the time that a connection may be without a request.

    A client that does not read its responses is cut off, too.
    """

    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Takes a piece of a request."""
        super().data_received(data)
        self._watch()

    def handle_websocket_upgrade(self, event: Any) -> None:
        """Hands the connection to the protocol of WebSockets, which has limits of its own."""
        self._forget()
        super().handle_websocket_upgrade(event)

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
        self._forget()
        self._forget_stall()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Limits the time until there is a request, or the rest of one that has its response.

        uvicorn's own timer of idle connections ends with the first byte that comes.
        """
        is_served = self.cycle is not None and not self.cycle.response_complete
        is_socket = self.transport.get_protocol() is not self
        if is_served or is_socket or self.transport.is_closing():
            self._forget()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.close)

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
