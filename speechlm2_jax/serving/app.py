"""The HTTP application: its routes, and how errors are told."""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from speechlm2_jax.serving.access_log import AccessLog
from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.guard import ClientGoneError, Guard, unless_gone
from speechlm2_jax.serving.metrics import CLIENT_GONE, RequestCount
from speechlm2_jax.serving.pages import page_routes
from speechlm2_jax.serving.server_sent_events import EventStream
from speechlm2_jax.serving.service import Service

log = logging.getLogger(__name__)
Endpoint = Callable[[Service, Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """Makes the application of a service, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        yield
        service.stop()

    def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
        return Route(path, _counted(service, endpoint, path), methods=list(methods))

    access_log = [Middleware(AccessLog)] if service.options.access_log else []
    return Starlette(
        lifespan=lifespan,
        middleware=[*access_log, Middleware(Guard, options=service.options)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, 500: _fault},
        routes=[
            route("/v1/audio/transcriptions", _with_model("transcriptions", "transcribe"), "POST"),
            route("/v1/chat/completions", _with_model("chat", "complete"), "POST"),
            route("/v1/models", _models, "GET"),
            route("/v1/models/{name:path}", _model, "GET"),
            *page_routes(),
            Route("/health", _health(service)),
            Route("/ready", _ready(service)),
            Route("/metrics", _metrics(service)),
        ],
    )


def _counted(service: Service, endpoint: Endpoint, path: str) -> Callable[[Request], Awaitable]:
    """An endpoint whose requests are counted by their status, streams when they have ended."""

    async def run(request: Request) -> Response:
        count, status = RequestCount(service.metrics, path), 500
        request.state.count = count
        try:
            response = await endpoint(service, request)
        except (ClientGoneError, ClientDisconnect):
            status, response = CLIENT_GONE, Response(status_code=CLIENT_GONE)
        except ApiError as error:
            status = error.status
            raise
        except HTTPException as error:
            status = error.status_code
            raise
        else:
            status = response.status_code
            if isinstance(response, EventStream):
                status, response.on_end = None, count.ended
        finally:
            if status is not None:
                count.ended(status)
        return response

    return run


def _with_model(module: str, name: str) -> Endpoint:
    """An endpoint that needs the model, of a module that was imported together with it.

    A request has its place from before its body is read until its response is there, or its stream
    has ended. So what is refused is refused early, and what was let in is finished.
    """

    async def run(service: Service, request: Request) -> Response:
        limit_s = service.options.request_timeout_s
        end_s = asyncio.get_running_loop().time() + limit_s
        with ExitStack() as place:
            place.enter_context(service.place())
            own = importlib.import_module(f"speechlm2_jax.serving.{module}")
            response = await unless_gone(request, getattr(own, name)(service, request), limit_s)
            if isinstance(response, EventStream):
                response.keep(place.pop_all(), end_s)
        return response

    return run


def _card(service: Service) -> dict[str, object]:
    name = service.options.served_name
    return {"id": name, "object": "model", "created": service.created, "owned_by": "speechlm2_jax"}


async def _models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(service)]})


async def _model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    if name != service.options.served_name:
        raise ApiError(404, f"there is no model {name!r:.80}", code="model_not_found")
    return JSONResponse(_card(service))


def _health(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def health(request: Request) -> Response:
        is_fine = service.fault is None
        return JSONResponse({"status": "ok" if is_fine else "failed"}, 200 if is_fine else 500)

    return health


def _ready(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def ready(request: Request) -> Response:
        why = service.why_unready
        if why is not None:
            headers = {"Retry-After": "2"}
            return JSONResponse({"status": "not ready", "waits_for": why}, 503, headers=headers)
        name, has_words = service.options.served_name, service.alignment is not None
        return JSONResponse({"status": "ready", "model": name, "word_timestamps": has_words})

    return ready


def _metrics(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return metrics


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


async def _fault(request: Request, error: Exception) -> Response:
    return ApiError(500, f"{type(error).__name__}: the server failed").response()
