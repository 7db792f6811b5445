"""Files of web servers, by ranges of bytes. Redirects are followed by hand, as each is checked."""

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, ReadTimeoutError, TimeoutError
from urllib3.response import BaseHTTPResponse

from speechlm2_jax.data.storage import versions
from speechlm2_jax.data.storage.addresses import HTTP, scheme_of
from speechlm2_jax.data.storage.errors import StorageError, TemporaryError
from speechlm2_jax.data.storage.filesystems import FileState
from speechlm2_jax.data.storage.retries import Patience, persistently
from speechlm2_jax.settings import SettingsError

MOST_REDIRECTS = 5
_BLOCK_BYTES = 1 << 18
_CONNECTIONS = 16
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_CAUSES = {401: "forbidden", 403: "forbidden", 404: "missing", 410: "missing"}


class HttpFile:
    """A file of a web server.

    Args:
        address: its normalised address.
        check: raises SettingsError for an address that must not be read.
        limit_s: how long the whole of a read may take.
    """

    def __init__(self, address: str, check: Callable[[str], str], limit_s: float | None) -> None:
        self._address, self._check, self._limit_s = address, check, limit_s

    def state(self) -> FileState:
        """Size and version; both may be unknown. Raises StorageError."""
        patience = Patience(self._limit_s)

        def attempt() -> FileState:
            with self._opened(0, 0, patience) as (response, _, total):
                headers = response.headers
                if response.status == 206:
                    response.drain_conn()
                return FileState(size=total, version=_version(headers))

        return persistently(attempt, patience)

    def read(self, start: int, size: int) -> bytes:
        """So many bytes from `start` on, fewer at the end of the file. Raises StorageError."""
        if not size:
            return b""
        patience = Patience(self._limit_s)

        def attempt() -> bytes:
            with self._opened(start, start + size - 1, patience) as (response, first, total):
                if first != start:
                    raise StorageError(
                        f"{self._address}: the server gives no ranges of bytes; copy the file to "
                        "a disk, or read it from front to end (stream: true)",
                        cause="unreachable",
                    )
                versions.check(self._address, _version(response.headers))
                wanted = size if total is None else min(size, max(total - start, 0))
                data = b"".join(self._blocks(response))[:size]
                if len(data) < wanted:
                    raise self._cut_off(start + len(data))
                return data

        return persistently(attempt, patience)

    def stream(self, start: int) -> Iterator[bytes]:
        """Yields the file from `start` to its end; a dropped connection is taken up where it was.

        Each block has the whole time limit. Raises StorageError.
        """
        place, version, total = start, "", None
        patience = Patience(self._limit_s)
        pauses = patience.pauses()
        while True:
            try:
                with self._opened(place, None, patience) as (response, first, total):
                    now = response.headers.get("etag") or ""
                    if version and now != version:
                        message = f"{self._address}: changed while it was read"
                        raise StorageError(message, cause="changed")
                    version = now
                    versions.renew(self._address, _version(response.headers))
                    for block in self._blocks(response):
                        skipped = min(max(place - first, 0), len(block))
                        first += len(block)
                        if skipped == len(block):
                            continue
                        yield block[skipped:]
                        place = first
                        patience = Patience(self._limit_s)
                        pauses = patience.pauses()
                if total is not None and place < total:
                    raise self._cut_off(place)
                return
            except TemporaryError as error:
                pause = next(pauses, None)
                if pause is None:
                    raise StorageError(str(error), cause=error.cause) from error
                time.sleep(pause)

    def _cut_off(self, place: int) -> TemporaryError:
        message = f"{self._address}: the connection ended at byte {place}, before the file does"
        return TemporaryError(message, cause="incomplete")

    def _blocks(self, response: BaseHTTPResponse) -> Iterator[bytes]:
        while True:
            try:
                block = response.read(_BLOCK_BYTES, decode_content=False)
            except HTTPError as error:
                raise self._failed(error) from error
            if not block:
                return
            yield block

    @contextmanager
    def _opened(
        self, start: int, last: int | None, patience: Patience
    ) -> Iterator[tuple[BaseHTTPResponse, int, int | None]]:
        """The response to a request of a range, its first byte, and the size of the file."""
        response = self._requested(f"bytes={start}-{'' if last is None else last}", patience)
        try:
            match = _RANGE.fullmatch(response.headers.get("content-range", ""))
            if response.status == 416:
                total = int(match[3]) if match and match[3].isdigit() else start
                response.drain_conn()
                yield _EMPTY, start, total
            elif response.status == 206 and match and match[1]:
                yield response, int(match[1]), int(match[3]) if match[3].isdigit() else None
            else:
                length = response.headers.get("content-length", "")
                yield response, 0, int(length) if length.isdigit() else None
        finally:
            response.close()  # to the pool if it was read to its end

    def _requested(self, wanted: str, patience: Patience) -> BaseHTTPResponse:
        address = self._address
        headers = {"Range": wanted, "Accept-Encoding": "identity", "User-Agent": "speechlm2_jax"}
        for _ in range(MOST_REDIRECTS + 1):
            try:
                response = _pool(address).request(
                    "GET",
                    address,
                    headers=headers,
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    timeout=urllib3.Timeout(patience.stall_s),
                )
            except HTTPError as error:
                raise self._failed(error) from error
            place = response.get_redirect_location()
            if not place:
                return self._checked(response)
            response.close()
            address = self._redirected(address, urljoin(address, str(place)))
        raise StorageError(
            f"{self._address}: more than {MOST_REDIRECTS} redirects", cause="missing"
        )

    def _redirected(self, old: str, new: str) -> str:
        """Where a redirect leads. Raises StorageError for where it must not lead."""
        scheme = scheme_of(new)
        if scheme not in HTTP or (scheme, scheme_of(old)) == ("http", "https"):
            raise StorageError(f"{old}: redirects to {new}", cause="not_allowed")
        try:
            return self._check(new)
        except SettingsError as error:
            message = f"{self._address}: redirects to another place: {error}"
            raise StorageError(message, cause="not_allowed") from error

    def _checked(self, response: BaseHTTPResponse) -> BaseHTTPResponse:
        status = response.status
        if status in (200, 206, 416):
            return response
        response.close()
        message = f"{self._address}: HTTP status {status} {response.reason or ''}".rstrip()
        if status in _PASSING:
            raise TemporaryError(message, cause="unreachable")
        raise StorageError(message, cause=_CAUSES.get(status, "unreachable"))

    def _failed(self, error: HTTPError) -> TemporaryError:
        if isinstance(error, TimeoutError | ReadTimeoutError):
            return TemporaryError(f"{self._address}: nothing came in time", cause="timed_out")
        reason = " ".join(str(error).split())[:200]
        is_cut = "IncompleteRead" in reason
        cause = "incomplete" if is_cut else "unreachable"
        return TemporaryError(f"{self._address}: {reason}", cause=cause)


def _version(headers: Mapping[str, str]) -> str:
    """What changes with a file (RFC 9110, section 8.8); empty: not known."""
    return headers.get("etag") or headers.get("last-modified") or ""


_EMPTY = urllib3.HTTPResponse(body=b"", preload_content=False)


def _pool(address: str) -> urllib3.PoolManager:
    parts = urlsplit(address)
    proxy = getproxies().get(parts.scheme)
    if proxy and parts.hostname and not proxy_bypass(parts.hostname):
        return _pool_of(proxy)
    return _pool_of(None)


@functools.cache
def _pool_of(proxy: str | None) -> urllib3.PoolManager:
    """Connections, kept open between requests."""
    if proxy is None:
        return urllib3.PoolManager(num_pools=_CONNECTIONS, maxsize=_CONNECTIONS)
    return urllib3.ProxyManager(proxy, num_pools=_CONNECTIONS, maxsize=_CONNECTIONS)
