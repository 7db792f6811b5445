"""`POST /v1/chat/completions`, with text and `input_audio` parts."""

import asyncio
import json
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from speechlm2_jax.serving.api_errors import ApiError, bad
from speechlm2_jax.serving.fields import Fields, check_model, check_unicode, sampling_of
from speechlm2_jax.serving.responses import outcome_of, respond
from speechlm2_jax.serving.rows import Ask, Outcome, engine_of
from speechlm2_jax.serving.server_sent_events import Events, EventStream
from speechlm2_jax.serving.service import Service
from speechlm2_jax.serving.token_texts import shown_token, token_bytes

REFUSED: Mapping[str, str] = {
    "audio": "the model generates text only",
    "frequency_penalty": "leave it out",
    "presence_penalty": "leave it out",
    "function_call": "the model calls no tools",
    "functions": "the model calls no tools",
    "logit_bias": "leave it out",
    "n": "send the request several times, with seeds of its own",
    "parallel_tool_calls": "the model calls no tools",
    "prediction": "leave it out",
    "reasoning_effort": "leave it out",
    "service_tier": "there is one tier; leave it out",
    "store": "responses are not kept; leave it out",
    "tool_choice": "the model calls no tools",
    "tools": "the model calls no tools",
    "top_logprobs": "the log-probability of each generated token is kept, those of others are not",
    "web_search_options": "the model calls no tools",
}
HARMLESS = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
}
KNOWN = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "response_format",
    "modalities",
    "user",
    "metadata",
    *HARMLESS,
)
STREAM_OPTIONS = ("include_usage", "include_obfuscation")
WITHOUT_CHUNKS: Mapping[str, str] = {
    "stop": "the texts of its chunks are joined after they have ended",
    "logprobs": "the texts of its chunks are joined, and the joined text has none",
}
"""What a recording that is split into chunks does not allow, and why."""
ROLES = ("system", "developer", "user", "assistant")
MAX_STOPS, MAX_MESSAGES, MAX_CLIPS = 4, 256, 16
MAX_TEXT = 1 << 20
"""Characters of all messages: tokenizing more takes seconds, and no slot has room for it."""
MAX_MARKS = 1 << 18
_MARKS = (b"[", b"{", b",", b"\\")
"""Each value of JSON, and each escape in a text, comes with one of them."""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked request."""

    ask: Ask
    has_logprobs: bool
    includes_usage: bool
    id: str
    created: int
    model: str


async def complete(service: Service, request: Request) -> Response:
    """Generates the next turn of a conversation."""
    raw = b"".join([part async for part in request.stream()])
    received_s = request.state.count.body_read()
    body = await asyncio.to_thread(_parsed, raw)
    del raw
    if not isinstance(body, dict):
        raise bad(f"the body must be a JSON object, not {type(body).__name__}")
    chat = await _read(service, Fields(body), received_s)
    if chat.ask.is_streamed:
        return EventStream(service, _events(service, chat))
    outcome = await outcome_of(respond(service, chat.ask))
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": outcome.text, "refusal": None},
        "finish_reason": outcome.finish_reason,
        "logprobs": await _logprobs(service, outcome) if chat.has_logprobs else None,
    }
    return JSONResponse(
        {**_head(chat, "chat.completion"), "choices": [choice], "usage": _usage(outcome)}
    )


def _parsed(raw: bytes) -> Any:
    """The value of JSON. Raises ApiError.

    The parser holds the interpreter's lock, so the number of values is limited. One long recording
    takes no time.
    """
    if sum(map(raw.count, _MARKS)) > MAX_MARKS:
        raise ApiError(
            413, f"the JSON has more than {MAX_MARKS} values and escapes", code="request_too_large"
        )
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {error}"[:200]) from None
    check_unicode(body)
    return body


async def _read(service: Service, fields: Fields, received_s: float) -> ChatRequest:
    """Checks the fields of a request, and decodes its recordings."""
    fields.refuse(REFUSED, HARMLESS)
    fields.check_known(KNOWN)
    check_model(service, fields)
    if fields.get("response_format", {"type": "text"}) != {"type": "text"}:
        raise bad("response_format: only text is supported", "response_format")
    if fields.get("modalities", ["text"]) != ["text"]:
        raise bad('modalities: only ["text"] is supported', "modalities")
    most = service.options.max_new_tokens
    limit = fields.integer("max_tokens", most, 1, most)
    limit = fields.integer("max_completion_tokens", limit, 1, most)
    sampling, stop = sampling_of(fields), _stop(fields)
    includes_usage = _includes_usage(fields)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise bad(f"messages: expected a list of 1 to {MAX_MESSAGES} messages", "messages")
    reader = _Messages(service)
    dialog = [await reader.turn(message, number) for number, message in enumerate(messages)]
    if reader.long_s is not None:
        _check_chunks(service, fields, reader.long_s)
    return ChatRequest(
        ask=Ask(
            dialog=dialog,
            limit=limit,
            keys=tuple(reader.keys),
            sampling=sampling,
            stop=stop,
            is_streamed=fields.flag("stream"),
            received_s=received_s,
        ),
        has_logprobs=fields.flag("logprobs"),
        includes_usage=includes_usage,
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=service.options.served_name,
    )


def _includes_usage(fields: Fields) -> bool:
    """Whether a stream ends with the counts of tokens. Raises ApiError for wrong options."""
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise bad(f"stream_options: expected an object, got {options!r:.40}", "stream_options")
    if options and not fields.flag("stream"):
        raise bad("stream_options: needs stream=true; leave it out", "stream_options")
    for key, value in options.items():
        if key not in STREAM_OPTIONS:
            known = ", ".join(STREAM_OPTIONS)
            raise bad(f"stream_options.{key}: unknown; the server reads {known}", "stream_options")
        if not isinstance(value, bool | None):
            what = f"stream_options.{key}: expected true or false, got {value!r:.40}"
            raise bad(what, "stream_options")
    return options.get("include_usage") is True


def _check_chunks(service: Service, fields: Fields, long_s: float) -> None:
    """Raises ApiError for a field that a recording of `long_s` seconds, split, does not allow."""
    most_s = service.options.max_audio_s
    for key, why in WITHOUT_CHUNKS.items():
        if fields.get(key):
            raise bad(
                f"{key}: not supported with a recording of {long_s:.1f} s, which is more than "
                f"--max-audio-s {most_s:g} and split into chunks: {why}; leave it out, or send a "
                "shorter recording",
                key,
                "unsupported_parameter",
            )


def _check_keys(value: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Raises ApiError for a key that is not read, unless it is empty, as in a copied response."""
    for key, own in value.items():
        if key not in known and own not in (None, "", [], {}):
            raise bad(
                f"{place}.{key}: not supported; the server reads {', '.join(known)}", "messages"
            )


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop", [])
    strings = [value] if isinstance(value, str) else value
    is_fine = isinstance(strings, list) and len(strings) <= MAX_STOPS
    if not is_fine or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in strings):
        raise bad(f"stop: expected a text, or a list of up to {MAX_STOPS}, not empty", "stop")
    return tuple(strings)


class _Messages:
    """Turns messages into the turns of a dialog, with their recordings decoded."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.keys: list[bytes] = []
        self._text = 0
        self._audio_s = 0.0
        self.long_s: float | None = None
        """Duration of a recording that is split into chunks."""

    async def turn(self, message: Any, number: int) -> dict[str, Any]:
        """One message. Raises ApiError for a wrong one."""
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise bad(f"{place}: expected an object", "messages")
        _check_keys(message, ("role", "content"), place)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise bad(
                f"{place}.role: expected one of {', '.join(ROLES)}; got {role!r:.40}", "messages"
            )
        role = "system" if role == "developer" else role
        if isinstance(content, str):
            return {"role": role, "content": self._counted(content)}
        if not isinstance(content, list) or not content:
            raise bad(f"{place}.content: expected a text or a list of parts", "messages")
        parts = [await self._part(p, f"{place}.content[{i}]") for i, p in enumerate(content)]
        return {"role": role, "content": parts}

    async def _part(self, part: Any, place: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _check_keys(part, ("type", "text"), place)
            return {"type": "text", "text": self._counted(part["text"])}
        if kind != "input_audio":
            raise bad(f"{place}: expected text or input_audio; got {kind!r:.40}", "messages")
        _check_keys(part, ("type", "input_audio"), place)
        given = part.get("input_audio")
        audio = given if isinstance(given, dict) else {}
        data, form = audio.pop("data", None), audio.get("format", "")  # not kept when decoded
        if not isinstance(data, str) or not data:
            raise bad(f"{place}.input_audio.data: expected base64", "messages")
        if not isinstance(form, str):  # FFmpeg finds the format by the content
            raise bad(f"{place}.input_audio.format: expected a text, got {form!r:.40}", "messages")
        _check_keys(audio, ("data", "format"), f"{place}.input_audio")
        if len(self.keys) >= MAX_CLIPS:
            raise bad(f"{place}: more than {MAX_CLIPS} recordings", "messages")
        samples = await self._decoded(data, f"{place}.input_audio")
        return {"type": "audio", "audio": samples}

    async def _decoded(self, data: str, place: str) -> np.ndarray:
        rate_hz, options = engine_of(self._service).sampling_rate, self._service.options
        most_s = options.max_duration_s
        decoded = await self._service.workers.decode(data, rate_hz, most_s, place)
        self.keys.append(decoded.key)
        own_s = len(decoded.samples) / rate_hz
        self._audio_s += own_s
        if self._audio_s > most_s:
            reason = f"the recordings up to here have {self._audio_s:.0f} s"
            raise _too_large(f"{place}: {reason}, and the limit is {most_s:g} s", "audio_too_long")
        if len(decoded.samples) > int(options.max_audio_s * rate_hz):
            self.long_s = own_s
        return decoded.samples

    def _counted(self, text: str) -> str:
        self._text += len(text)
        if self._text > MAX_TEXT:
            raise _too_large(
                f"messages: more than {MAX_TEXT} characters of text", "context_length_exceeded"
            )
        return text


def _too_large(message: str, code: str) -> ApiError:
    return ApiError(413, message, param="messages", code=code)


async def _events(service: Service, chat: ChatRequest) -> Events:
    """The chunks of a streamed completion."""

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        more = {"usage": None} if chat.includes_usage else {}
        return {**_head(chat, "chat.completion.chunk"), "choices": [choice], **more}

    yield chunk({"role": "assistant", "content": ""})
    async with aclosing(respond(service, chat.ask)) as events:
        async for event in events:
            if isinstance(event, str):
                yield chunk({"content": event})
                continue
            last = chunk({}, event.finish_reason)
            if chat.has_logprobs:
                last["choices"][0]["logprobs"] = await _logprobs(service, event)
            yield last
            if chat.includes_usage:
                head = _head(chat, "chat.completion.chunk")
                yield {**head, "choices": [], "usage": _usage(event)}


def _head(chat: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": chat.id, "object": kind, "created": chat.created, "model": chat.model}


def _usage(outcome: Outcome) -> dict[str, int]:
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
    }


async def _logprobs(service: Service, outcome: Outcome) -> dict[str, Any]:
    """The log-probability of each token of the response."""
    tokenizer, content = engine_of(service).tokenizer, []
    for part in outcome.parts:
        data = await asyncio.to_thread(token_bytes, tokenizer, part.ids)
        tokens = zip(data, tokenizer.ids_to_tokens(part.ids), part.logprobs.tolist(), strict=True)
        for own, spelling, value in tokens:
            shown = {"token": shown_token(own, spelling), "bytes": list(own)}
            content.append({**shown, "logprob": value, "top_logprobs": []})
    return {"content": content, "refusal": None}
