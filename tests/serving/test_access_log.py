"""Each request is one line of the log, without keys and contents."""

import asyncio
import logging
import re

import httpx

from speechlm2_jax.serving.app import make_app
from speechlm2_jax.serving.common_arguments import KEY_VARIABLE
from speechlm2_jax.serving.options import ServeOptions
from speechlm2_jax.serving.service import Service
from tests.serving.test_arguments import options


def lines_of(caplog, *requests, **changes):
    """The log of requests to a server whose model is not loaded; seconds are left out."""
    service = Service(
        ServeOptions(model="m", api_keys=("secret",), **changes), lambda options: None
    )
    transport = httpx.ASGITransport(make_app(service))

    async def send():
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            for method, path in requests:
                await client.request(method, path, headers={"Authorization": "Bearer secret"})
            await client.get("/v1/models")

    with caplog.at_level(logging.INFO, "speechlm2_jax.serving.access_log"):
        asyncio.run(send())
    own = [r.getMessage() for r in caplog.records if r.name.endswith("access_log")]
    return [re.sub(r" \d+\.\d{3} s$", "", line) for line in own]


REQUESTS = (
    ("GET", "/v1/models?key=secret"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/a%0Ab"),
    ("GET", "/health"),
    ("GET", "/metrics"),
)


def test_each_request_is_one_line_refused_ones_too(caplog):
    assert lines_of(caplog, *REQUESTS) == [
        "GET /v1/models 200",
        "POST /v1/chat/completions 503",
        r"GET /a\nb 404",
        "GET /v1/models 401",
    ]


def test_the_access_log_can_be_left_out(caplog, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert lines_of(caplog, *REQUESTS, access_log=False) == []
    assert options("m").access_log and not options("m", "--no-access-log").access_log
