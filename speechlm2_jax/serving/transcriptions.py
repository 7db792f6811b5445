"""`POST /v1/audio/transcriptions`."""

import zlib
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from speechlm2_jax.inference.timed_text import Segment, Transcript
from speechlm2_jax.inference.transcript_files import write_transcript
from speechlm2_jax.serving.api_errors import bad
from speechlm2_jax.serving.fields import Fields, check_model, sampling_of
from speechlm2_jax.serving.guard import unless_gone
from speechlm2_jax.serving.responses import Ask, Outcome, outcome_of, respond
from speechlm2_jax.serving.server_sent_events import Events, EventStream
from speechlm2_jax.serving.service import Service

PLAIN: Mapping[str, str] = {"text": "txt", "srt": "srt", "vtt": "vtt"}
"""A response format -> the name of the file format."""
FORMATS = ("json", *PLAIN, "verbose_json")
KNOWN = (
    "file",
    "model",
    "language",
    "prompt",
    "response_format",
    "temperature",
    "top_p",
    "timestamp_granularities[]",
    "stream",
    "seed",
    "chunking_strategy",
)
REFUSED: Mapping[str, str] = {
    "include": "leave it out",
    "include[]": "log-probabilities are in verbose_json's segments; leave it out",
    "known_speaker_names[]": "speakers are not told apart; leave it out",
    "known_speaker_references[]": "speakers are not told apart; leave it out",
}
MAX_FIELDS = 32
MAX_FIELD_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class TranscriptionRequest:
    """A checked request."""

    ask: Ask
    response_format: str
    language: str
    audio_s: float
    rate_hz: int


async def transcribe(service: Service, request: Request) -> Response:
    """Transcribes one uploaded recording."""
    service.ready()
    service.check_room()
    async with request.form(
        max_files=2, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    ) as form:
        fields, file = _read_form(form)
        _check(service, fields)
        data = await file.read()
    received_s = request.state.count.body_read()
    if not data:
        raise bad("file: the upload is empty", "file", "invalid_audio")
    read = await _read(service, fields, data, received_s)
    if fields.flag("stream"):
        return EventStream(service, _events(service, read))
    with service.place():
        outcome = await unless_gone(
            request, outcome_of(service, read.ask), service.options.request_timeout_s
        )
    return _written(read, outcome)


def _read_form(form: FormData) -> tuple[Fields, UploadFile]:
    files = [value for value in form.getlist("file") if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise bad("file: send one audio file as multipart/form-data", "file", "missing_file")
    values: dict[str, Any] = {}
    for key in form:
        own = form.getlist(key)
        if key != "file" and not all(isinstance(value, str) for value in own):
            raise bad(f"{key}: expected a text, got a file", key)
        if len(own) > 1 and not key.endswith("[]"):
            raise bad(f"{key}: given {len(own)} times; give it once", key)
        values[key] = own if key.endswith("[]") else own[0]
    return Fields(values), files[0]


def _check(service: Service, fields: Fields) -> None:
    """Raises ApiError for fields that the server cannot honour."""
    fields.refuse(REFUSED, {})
    fields.check_known(KNOWN)
    check_model(service, fields)
    own = service.options.language
    language = fields.text("language", own or "")
    if language and language != own:
        what = f"this server transcribes {own}" if own else "the model takes no language"
        raise bad(f"language: {what}; leave it out", "language", "unsupported_parameter")
    form = fields.one_of("response_format", FORMATS, "json")
    granularities = fields.get("timestamp_granularities[]", [])
    if granularities and form != "verbose_json":
        name = "timestamp_granularities[]"
        raise bad(f"{name}: needs response_format=verbose_json", name)
    for value in granularities:
        if value != "segment":
            name = "timestamp_granularities[]"
            why = "word: this model has no word timestamps" if value == "word" else f"{value!r:.20}"
            raise bad(f"{name}: {why}; use segment", name, "unsupported_parameter")
    fields.one_of("chunking_strategy", ("auto", ""), "")
    if fields.flag("stream") and form not in ("json", "text"):
        raise bad("stream: needs response_format=json or text", "stream")


async def _read(
    service: Service, fields: Fields, data: bytes, received_s: float
) -> TranscriptionRequest:
    engine, _ = service.ready()
    sampling = sampling_of(fields)
    options = service.options
    decoded = await service.workers.decode(
        data, engine.sampling_rate, options.max_duration_s, "file"
    )
    tag = engine.audio_locator_tag
    prompt = fields.text("prompt") or options.prompt
    content = prompt if tag in prompt else f"{prompt} {tag}".strip()
    ask = Ask(
        dialog=[{"role": "user", "content": content, "audio": [decoded.samples]}],
        limit=options.max_new_tokens,
        keys=(decoded.key,),
        sampling=sampling,
        is_streamed=fields.flag("stream"),
        received_s=received_s,
    )
    return TranscriptionRequest(
        ask=ask,
        response_format=fields.text("response_format", "json"),
        language=options.language or "",
        audio_s=len(decoded.samples) / engine.sampling_rate,
        rate_hz=engine.sampling_rate,
    )


async def _events(service: Service, read: TranscriptionRequest) -> Events:
    """The events of a streamed transcription."""
    is_begun, held = False, ""
    async with aclosing(respond(service, read.ask)) as events:
        async for event in events:
            if isinstance(event, Outcome):
                text = event.text.strip()
                yield {"type": "transcript.text.done", "text": text, "usage": _usage(event)}
                return
            # white space around the text is left out, as in the whole response
            delta = held + event if is_begun else event.lstrip()
            kept = delta.rstrip()
            held = delta[len(kept) :]
            if kept:
                is_begun = True
                yield {"type": "transcript.text.delta", "delta": kept}


def _usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "type": "tokens",
        "input_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
    }


def _written(read: TranscriptionRequest, outcome: Outcome) -> Response:
    transcript = transcript_of(read, outcome)
    form = read.response_format
    if form in PLAIN:
        text = write_transcript(transcript, PLAIN[form])
        return PlainTextResponse(text)
    if form == "json":
        return JSONResponse({"text": transcript.text, "usage": _usage(outcome)})
    return JSONResponse(
        {
            "task": "transcribe",
            "language": read.language,
            "duration": round(read.audio_s, 3),
            "text": transcript.text,
            "segments": _segments(read, transcript, outcome),
            "usage": {"type": "duration", "seconds": round(read.audio_s)},
        }
    )


def transcript_of(read: TranscriptionRequest, outcome: Outcome) -> Transcript:
    """The text with a segment for each chunk of the recording, or one for the whole."""
    segments = []
    for part in outcome.parts:
        chunk, rate = part.chunk, read.rate_hz
        start, end = (
            (0.0, read.audio_s) if chunk is None else (chunk.start / rate, chunk.end / rate)
        )
        segments.append(Segment(text=part.text.strip(), start=start, end=end))
    return Transcript(outcome.text.strip(), segments=segments, duration_s=read.audio_s)


def _segments(
    read: TranscriptionRequest, transcript: Transcript, outcome: Outcome
) -> list[dict[str, Any]]:
    found, sampling = [], read.ask.sampling
    for number, (own, part) in enumerate(zip(transcript.segments, outcome.parts, strict=True)):
        raw = own.text.encode()
        found.append(
            {
                "id": number,
                "seek": 0,
                "start": round(own.start, 3),
                "end": round(own.end, 3),
                "text": own.text,
                "tokens": part.ids.tolist(),
                "temperature": sampling.temperature if sampling.do_sample else 0.0,
                "avg_logprob": float(part.logprobs.mean()) if len(part.logprobs) else 0.0,
                "compression_ratio": len(raw) / max(len(zlib.compress(raw)), 1),
            }
        )
    return found
