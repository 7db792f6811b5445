"""Runs one connection: messages in, the agent's chunks out, limits, and how it is closed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from speechlm2_jax.serving.duplex.conversation import BufferedConversation
from speechlm2_jax.serving.duplex.metrics import ConversationMetrics
from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.duplex.protocol import POLICY, TRY_LATER, CloseError, Protocol, Sent
from speechlm2_jax.serving.duplex.sessions import SessionEndedError

TICK_S = 0.02
ABNORMAL = 1006
MAX_REASON_BYTES = 123
"""Of a close frame (RFC 6455)."""


class Connection:
    """One accepted WebSocket with its protocol and its conversation."""

    def __init__(
        self,
        socket: WebSocket,
        protocol: Protocol,
        conversation: BufferedConversation,
        options: ConversationOptions,
    ) -> None:
        self._socket, self._protocol, self._conversation = socket, protocol, conversation
        self._options = options

    async def run(self) -> None:
        """Runs until the client leaves (WebSocketDisconnect) or something ends it (CloseError)."""
        await self._send(self._protocol.greeting())
        async with _all_of(self._receive(), self._send_agent(), self._watch()) as first:
            await first

    async def _receive(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            text = message.get("text")
            given: Sent = (message.get("bytes") or b"") if text is None else text
            await self._send(await self._protocol.receive(given, self._conversation))

    async def _send_agent(self) -> None:
        while True:
            try:
                chunk = await self._conversation.next()
            except SessionEndedError as error:
                code = TRY_LATER if error.is_refused else POLICY
                raise CloseError(code, str(error)) from error
            await self._send(self._protocol.agent(chunk))
            self._conversation.sent(chunk)

    async def _watch(self) -> None:
        """Fills in for late audio, and ends what takes too long."""
        options, begun_s = self._options, time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            self._conversation.fill()
            if time.monotonic() - begun_s > options.max_session_s:
                raise CloseError(
                    POLICY, f"the conversation has reached its limit of {options.max_session_s:g} s"
                )
            if self._conversation.idle_s > options.idle_timeout_s:
                raise CloseError(POLICY, f"no audio came for {options.idle_timeout_s:g} s")

    async def _send(self, messages: Sequence[Sent]) -> None:
        try:
            for message in messages:
                if isinstance(message, str):
                    await self._socket.send_text(message)
                else:
                    await self._socket.send_bytes(message)
        except RuntimeError as error:  # the WebSocket was closed below: a giant message
            raise WebSocketDisconnect(ABNORMAL) from error


@contextlib.asynccontextmanager
async def _all_of(*work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Future[None]]:
    """Runs coroutines at once; the future has what the first one that ends raises."""
    tasks = [asyncio.ensure_future(own) for own in work]
    first: asyncio.Future[None] = asyncio.ensure_future(_first(tasks))
    try:
        yield first
    finally:
        for task in (*tasks, first):
            task.cancel()
        await asyncio.gather(*tasks, first, return_exceptions=True)


async def _first(tasks: Sequence["asyncio.Future[None]"]) -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


async def close(socket: WebSocket, protocol: Protocol, error: CloseError) -> None:
    """Tells the client what is wrong, and closes; a client that is gone already is no fault."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        for message in protocol.farewell(error):
            await (
                socket.send_text(message)
                if isinstance(message, str)
                else socket.send_bytes(message)
            )
        reason = error.reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        await socket.close(error.code, reason)


def count_end(metrics: ConversationMetrics, name: str, code: int, begun_s: float) -> None:
    """Counts a conversation that has ended."""
    metrics.closed.labels(name, str(code)).inc()
    metrics.length_s.observe(time.monotonic() - begun_s)
