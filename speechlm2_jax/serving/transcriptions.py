"""`POST /v1/audio/transcriptions`."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from speechlm2_jax.inference.long_form.pauses import Stretch
from speechlm2_jax.inference.timestamps import DEFAULT_ALIGNER
from speechlm2_jax.inference.timestamps.confidence import ToText
from speechlm2_jax.inference.transcript_files import write_transcript
from speechlm2_jax.serving.api_errors import bad
from speechlm2_jax.serving.fields import Fields, check_model, check_unicode, sampling_of
from speechlm2_jax.serving.pieces import cut, transcribe_parts
from speechlm2_jax.serving.responses import outcome_of
from speechlm2_jax.serving.rows import Ask, Outcome, engine_of
from speechlm2_jax.serving.server_sent_events import Events, EventStream
from speechlm2_jax.serving.service import Service
from speechlm2_jax.serving.timed_response import TimedResponse, segments_json, words_json

PLAIN: Mapping[str, str] = {"text": "txt", "srt": "srt", "vtt": "vtt"}
"""A response format -> the name of the file format."""
GRANULARITIES = "timestamp_granularities[]"
FORMATS = ("json", *PLAIN, "verbose_json")
KNOWN = (
    "file",
    "model",
    "language",
    "prompt",
    "response_format",
    "temperature",
    "top_p",
    GRANULARITIES,
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
    granularities: tuple[str, ...]
    """Of segment and word: what verbose_json has times of."""
    language: str
    wave: Float32[np.ndarray, " S"]
    parts: list[Stretch]
    """The parts of the recording with speech."""
    rate_hz: int
    to_text: ToText

    @property
    def audio_s(self) -> float:
        """Duration of the recording."""
        return len(self.wave) / self.rate_hz

    @property
    def has_times(self) -> bool:
        """Whether the response tells times."""
        return self.response_format in ("srt", "vtt", "verbose_json")


async def transcribe(service: Service, request: Request) -> Response:
    """Transcribes one uploaded recording."""
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
    outcome = await outcome_of(transcribe_parts(service, read.ask, read.parts))
    return await asyncio.to_thread(_written, read, await _timed(service, read, outcome))


async def _timed(service: Service, read: TranscriptionRequest, outcome: Outcome) -> TimedResponse:
    """The outcome with the times of its words, if they are asked for and there is an aligner."""
    timed = TimedResponse(outcome, read.wave, read.parts, read.rate_hz)
    if read.has_times and service.alignment is not None:
        timed.words = await service.alignment.words(read.wave, read.parts, timed.texts)
    return timed


def _read_form(form: FormData) -> tuple[Fields, UploadFile]:
    files = [value for value in form.getlist("file") if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise bad("file: send one audio file as multipart/form-data", "file", "missing_file")
    values: dict[str, Any] = {}
    check_unicode([*form])
    for key in form:
        own = form.getlist(key)
        if key != "file" and not all(isinstance(value, str) for value in own):
            raise bad(f"{key}: expected a text, got a file", key)
        if len(own) > 1 and not key.endswith("[]"):
            raise bad(f"{key}: given {len(own)} times; give it once", key)
        values[key] = own if key.endswith("[]") else own[0]
    check_unicode(values)
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
    _check_granularities(service, fields.get(GRANULARITIES, []), form)
    fields.one_of("chunking_strategy", ("auto", ""), "")
    if fields.flag("stream") and form in ("srt", "vtt"):
        raise bad("stream: needs response_format=json, text or verbose_json", "stream")


def _check_granularities(service: Service, asked: Sequence[str], form: str) -> None:
    name = GRANULARITIES
    if asked and form != "verbose_json":
        raise bad(f"{name}: needs response_format=verbose_json", name)
    if unknown := [value for value in asked if value not in ("segment", "word")]:
        raise bad(f"{name}: expected segment or word, got {unknown[0]!r:.20}", name)
    if "word" in asked and service.alignment is None:
        raise bad(
            f"{name}: word: this server has no aligner, an ASR model that finds the times of "
            f"words; start it with --aligner, such as --aligner {DEFAULT_ALIGNER}; or use segment",
            name,
            "unsupported_parameter",
        )


async def _read(
    service: Service, fields: Fields, data: bytes, received_s: float
) -> TranscriptionRequest:
    engine = engine_of(service)
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
        granularities=tuple(fields.get(GRANULARITIES, ["segment"])),
        language=options.language or "",
        wave=decoded.samples,
        parts=await cut(service, decoded.samples),
        rate_hz=engine.sampling_rate,
        to_text=engine.tokenizer.ids_to_text,
    )


async def _events(service: Service, read: TranscriptionRequest) -> Events:
    """The events of a streamed transcription."""
    async with aclosing(transcribe_parts(service, read.ask, read.parts)) as events:
        async for event in events:
            if isinstance(event, str):
                yield {"type": "transcript.text.delta", "delta": event}
                continue
            timed = await _timed(service, read, event)
            times = await asyncio.to_thread(_times, read, timed) if read.has_times else {}
            done = {"type": "transcript.text.done", "text": event.text, **times}
            yield {**done, "usage": _usage(event)}


def _usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "type": "tokens",
        "input_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
    }


def _times(read: TranscriptionRequest, timed: TimedResponse) -> dict[str, Any]:
    """What verbose_json has times of."""
    sampling, asked = read.ask.sampling, read.granularities
    temperature = sampling.temperature if sampling.do_sample else 0.0
    words = {"words": words_json(timed)} if "word" in asked else {}
    if "segment" not in asked:
        return words
    return {**words, "segments": segments_json(timed, temperature, read.to_text)}


def _written(read: TranscriptionRequest, timed: TimedResponse) -> Response:
    form = read.response_format
    if form in PLAIN:
        return PlainTextResponse(write_transcript(timed.transcript, PLAIN[form]))
    if form == "json":
        usage = _usage(timed.outcome)
        return JSONResponse({"text": timed.outcome.text, "usage": usage})
    return JSONResponse(
        {
            "task": "transcribe",
            "language": read.language,
            "duration": round(read.audio_s, 3),
            "text": timed.outcome.text,
            **_times(read, timed),
            "usage": {"type": "duration", "seconds": round(read.audio_s)},
        }
    )
