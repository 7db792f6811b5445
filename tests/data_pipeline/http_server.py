"""A web server on this machine that serves bytes by ranges, and fails on request."""

import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """The files of a server, its faults, and what was asked of it."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, list] = defaultdict(list)
        """By path, what happens to the next requests: a status, "stall", "drop", a redirect."""
        self.requests: list[tuple[str, str]] = []
        self.has_ranges = True
        self.url = ""
        self.stalled = threading.Event()

    def put(self, name, data):
        self.files["/" + name] = data
        return f"{self.url}/{name}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        pass  # clients that close a connection


@contextmanager
def serving():
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            wanted = self.headers.get("Range", "")
            site.requests.append((path, wanted))
            fault = site.faults[path].pop(0) if site.faults[path] else None
            if isinstance(fault, str) and "://" in fault:
                self.send_response(302)
                self.send_header("Location", fault)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "stall":
                site.stalled.wait(5)
                self.close_connection = True
                return
            data = site.files.get(path)
            if isinstance(fault, int) or data is None:
                self.send_response(fault if isinstance(fault, int) else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._send(data, wanted if site.has_ranges else "", fault)

        def _send(self, data, wanted, fault):
            first, last = 0, len(data) - 1
            if wanted:
                low, _, high = wanted.removeprefix("bytes=").partition("-")
                first, last = int(low), min(int(high or last), last)
            if first > last and wanted:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = data[first : last + 1]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("ETag", f'"{hash(data)}"')
            self.send_header("Last-Modified", formatdate(0))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "drop":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            if fault == "trickle":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                time.sleep(0.6)
                self.close_connection = True
                return
            self.wfile.write(body)

    server = _Server(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.stalled.set()
        server.shutdown()
        server.server_close()
        thread.join()
