"""The application of a server of conversations: its routes, and who is let in."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from speechlm2_jax.serving.access_log import AccessLog
from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.duplex.connection import Connection, close, count_end
from speechlm2_jax.serving.duplex.moshi import MoshiProtocol
from speechlm2_jax.serving.duplex.origins import OriginGuard
from speechlm2_jax.serving.duplex.protocol import FAULT, CloseError, Protocol
from speechlm2_jax.serving.duplex.realtime import RealtimeProtocol, RealtimeSettings
from speechlm2_jax.serving.duplex.service import ConversationService
from speechlm2_jax.serving.guard import Guard
from speechlm2_jax.serving.pages import FILES as PAGE_FILES
from speechlm2_jax.serving.pages import page_routes

log = logging.getLogger(__name__)
FILES = {**PAGE_FILES, "/worklet.js": ("worklet.js", "text/javascript; charset=utf-8")}
NewProtocol = Callable[[ConversationService, WebSocket], Protocol]
ACCEPTED_PROTOCOL = "realtime"
"""The subprotocol that browsers name beside their key."""


def make_app(service: ConversationService) -> Starlette:
    """Makes the application of a service, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        yield
        service.stop()

    options = service.options
    access_log = [Middleware(AccessLog)] if options.access_log else []
    return Starlette(
        lifespan=lifespan,
        middleware=[
            *access_log,
            Middleware(OriginGuard, options=options, metrics=service.metrics),
            Middleware(Guard, options=options),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        routes=[
            WebSocketRoute("/api/chat", _endpoint(service, _moshi)),
            WebSocketRoute("/v1/realtime", _endpoint(service, _realtime)),
            Route("/v1/models", _models(service)),
            *page_routes(FILES, "speechlm2_jax.serving.duplex"),
            Route("/health", _health(service)),
            Route("/ready", _ready(service)),
            Route("/metrics", _metrics(service)),
        ],
    )


def _moshi(service: ConversationService, socket: WebSocket) -> Protocol:
    return MoshiProtocol(service.metrics, service.options.served_name)


def _realtime(service: ConversationService, socket: WebSocket) -> Protocol:
    assert service.facts is not None
    return RealtimeProtocol(
        RealtimeSettings(
            model=service.options.served_name,
            facts=service.facts,
            metrics=service.metrics,
            sends_frames=socket.query_params.get("frames") == "true",
        )
    )


def _endpoint(
    service: ConversationService, new_protocol: NewProtocol
) -> Callable[[WebSocket], Awaitable[None]]:
    """An endpoint that runs conversations of a protocol."""

    async def run(socket: WebSocket) -> None:
        asked = socket.scope["subprotocols"]
        await socket.accept(ACCEPTED_PROTOCOL if ACCEPTED_PROTOCOL in asked else None)
        try:
            service.check_room()
        except CloseError as error:
            service.metrics.refused.labels("room").inc()
            await socket.close(error.code, str(error))
            return
        await _converse(service, socket, new_protocol(service, socket))

    return run


async def _converse(service: ConversationService, socket: WebSocket, protocol: Protocol) -> None:
    begun_s, code = time.monotonic(), FAULT
    try:
        with service.conversation(protocol.USER_HZ) as conversation:
            await Connection(socket, protocol, conversation, service.options).run()
    except WebSocketDisconnect as error:
        code = error.code
    except CloseError as error:
        code = error.code
        await close(socket, protocol, error)
    except Exception as error:
        log.exception("a conversation failed")
        await close(
            socket, protocol, CloseError(FAULT, f"{type(error).__name__}: the server failed")
        )
    finally:
        count_end(service.metrics, protocol.NAME, code, begun_s)


Endpoint = Callable[[Request], Awaitable[Response]]


def _models(service: ConversationService) -> Endpoint:
    async def models(request: Request) -> Response:
        name = service.options.served_name
        card = {"id": name, "object": "model", "created": service.created}
        data = [{**card, "owned_by": "speechlm2_jax"}]
        return JSONResponse({"object": "list", "data": data})

    return models


def _health(service: ConversationService) -> Endpoint:
    async def health(request: Request) -> Response:
        is_fine = service.fault is None
        return JSONResponse({"status": "ok" if is_fine else "failed"}, 200 if is_fine else 500)

    return health


def _ready(service: ConversationService) -> Endpoint:
    async def ready(request: Request) -> Response:
        why = service.why_unready
        if why is not None:
            headers = {"Retry-After": "2"}
            return JSONResponse({"status": "not ready", "waits_for": why}, 503, headers=headers)
        facts, options = service.facts, service.options
        assert facts is not None
        return JSONResponse(
            {
                "status": "ready",
                "model": options.served_name,
                "needs_key": bool(options.api_keys),
                "free": max(0, options.max_sessions - service.active),
                "chunk_ms": round(1000 * facts.chunk_s),
                "latency_ms": round(1000 * facts.latency_s, 1),
            }
        )

    return ready


def _metrics(service: ConversationService) -> Endpoint:
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return metrics


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()
