"""Which hosts, origins and keys a connection may come with.

Pages of other sites may not use a server on this machine. A browser sends the page's Origin with
every WebSocket, and the name in the Host header tells a name that was made to point here.
"""

import ipaddress
from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from speechlm2_jax.serving.api_errors import ApiError
from speechlm2_jax.serving.duplex.metrics import ConversationMetrics
from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.guard import check_key

KEY_PROTOCOL = "openai-insecure-api-key."
"""Before the key in a WebSocket subprotocol: browsers cannot send the header Authorization."""


class OriginGuard:
    """Refuses connections with a wrong Host, Origin or key, before they are accepted."""

    def __init__(
        self, app: ASGIApp, options: ConversationOptions, metrics: ConversationMetrics
    ) -> None:
        self._app, self._options, self._metrics = app, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request, or responds with the reason why not."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            self._metrics.refused.labels(error.code or "").inc()
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, options = Headers(scope=scope), self._options
        host = headers.get("host", "")
        if not is_known_host(host, (options.host, *options.allowed_hosts)):
            raise ApiError(
                403, f"Host {host!r:.80} is not known; add it by --allow-host", code="host"
            )
        origin = headers.get("origin")
        if origin is not None and not is_known_origin(origin, host, options.allowed_origins):
            raise ApiError(
                403, f"Origin {origin!r:.80} may not connect; add it by --allow-origin",
                code="origin",
            )  # fmt: skip
        if scope["type"] == "websocket":
            try:
                check_key(_authorization(scope, headers), options.api_keys)
            except ApiError as error:
                error.code = "key"
                raise


def is_known_host(host: str, names: Sequence[str]) -> bool:
    """Whether a Host header has an address, localhost or one of `names`, with any port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_known_origin(origin: str, host: str, others: Sequence[str]) -> bool:
    """Whether a page of `origin` is this server's own, or one of `others`."""
    if origin in others:
        return True
    own = urlsplit(origin)
    return own.scheme in ("http", "https") and own.netloc == host


def _authorization(scope: Scope, headers: Headers) -> bytes:
    """The value of the header, or one made of a subprotocol or the query's `key`."""
    if "authorization" in headers:
        return headers["authorization"].encode("latin-1")
    keys = [p.removeprefix(KEY_PROTOCOL) for p in scope["subprotocols"] if KEY_PROTOCOL in p]
    keys += parse_qs(scope["query_string"].decode("latin-1")).get("key", [])
    return b"Bearer " + keys[0].encode() if keys else b""
