"""OpenAI's Realtime protocol: JSON events, audio as 16-bit PCM at 24 kHz in base64.

A response is a turn of the agent, which begins one when it will: nothing has to be committed or
asked for. With `?frames=true` the audio comes in `speechlm2.frames` instead: events with all audio
and text of each chunk, in turns and between them, and their times; the page uses them.
"""

import binascii
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speechlm2_jax.serving.duplex.conversation import AgentChunk, BufferedConversation
from speechlm2_jax.serving.duplex.metrics import ConversationMetrics
from speechlm2_jax.serving.duplex.protocol import (
    UNSUPPORTED,
    CloseError,
    Protocol,
    Sent,
    TurnTracker,
)
from speechlm2_jax.serving.duplex.realtime_events import (
    FORMAT,
    RATE_HZ,
    ResponseEvents,
    error_event,
    event,
    new_id,
    pcm_base64,
    pcm_samples,
)
from speechlm2_jax.serving.duplex.sessions import SessionFacts
from speechlm2_jax.serving.duplex.speech_detector import SpeechDetector

Handler = Callable[
    ["RealtimeProtocol", Mapping[str, Any], BufferedConversation], Awaitable[list[Sent]]
]
NOTICES: Mapping[tuple[str, ...], str] = {
    ("turn_detection",): "the model decides itself when its turn begins and ends",
    ("audio", "input", "turn_detection"): "the model decides itself when its turn begins and ends",
    ("audio", "output", "voice"): "the model has the voice of its training",
    ("instructions",): "the model takes no text",
    ("tools",): "the model takes no text",
}
"""Fields of a session without effect, and why; a client that sets one is told."""


class EventError(ValueError):
    """An event of the client that is wrong, with the name of the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True, kw_only=True)
class RealtimeSettings:
    """What a connection knows of its server."""

    model: str
    facts: SessionFacts
    metrics: ConversationMetrics
    sends_frames: bool = False


class RealtimeProtocol(Protocol):
    """One connection of `/v1/realtime`."""

    NAME, USER_HZ = "realtime", RATE_HZ

    def __init__(self, settings: RealtimeSettings) -> None:
        self._settings, self._turn = settings, TurnTracker(settings.facts)
        self._speech = SpeechDetector(RATE_HZ)
        self._id, self._item_id = new_id("sess"), new_id("item")
        self._response: ResponseEvents | None = None
        self._due: list[Sent] = []
        """Events of the user's speech, which go out before what the agent makes of it."""

    def greeting(self) -> Sequence[Sent]:
        """`session.created`."""
        return [event("session.created", session=self._session())]

    async def receive(self, message: Sent, conversation: BufferedConversation) -> Sequence[Sent]:
        """Acts on an event; a wrong one gives an `error` event, and the connection stays open."""
        if isinstance(message, bytes):
            raise CloseError(UNSUPPORTED, "events must be text messages with JSON")
        cause = None
        try:
            given = json.loads(message)
            if not isinstance(given, dict):
                raise EventError("an event must be a JSON object")
            cause = given.get("event_id") if isinstance(given.get("event_id"), str) else None
            handler = HANDLERS.get(str(given.get("type")))
            if handler is None:
                raise EventError(f"type {str(given.get('type'))!r:.80} is not supported", "type")
            return await handler(self, given, conversation)
        except EventError as error:
            text, param, code = str(error), error.param, error.code
        except (json.JSONDecodeError, RecursionError):
            text, param, code = "the event is no JSON", None, "invalid_json"
        self._settings.metrics.bad_messages.inc()
        return [error_event(text, param=param, code=code, cause=cause)]

    def agent(self, chunk: AgentChunk) -> Sequence[Sent]:
        """The events of the agent's frames."""
        messages = self._speech_events()
        messages += [self._frames(chunk)] if self._settings.sends_frames else []
        each = len(chunk.audio) / max(len(chunk.frames), 1)
        for n, frame in enumerate(chunk.frames):
            audio = chunk.audio[round(n * each) : round((n + 1) * each)]
            begins, ends = self._turn.next(frame.text_token)
            if begins:
                self._response = ResponseEvents()
                messages += self._response.begin()
            if self._response is not None:
                messages += self._response.text(frame.text)
                messages += [] if self._settings.sends_frames else self._response.audio(audio)
            if ends:
                messages += self._end(is_cancelled=False)
        return messages

    def farewell(self, error: CloseError) -> Sequence[Sent]:
        """The error as an event."""
        code = "session_expired" if "limit" in error.reason else None
        return [error_event(error.reason, code=code)]

    def _end(self, *, is_cancelled: bool) -> list[Sent]:
        response, self._response = self._response, None
        return [] if response is None else [*response.end(is_cancelled=is_cancelled)]

    def _frames(self, chunk: AgentChunk) -> str:
        frames, computed = chunk.frames, chunk.computed
        return event(
            "speechlm2.frames",
            start_s=frames[0].start_s if frames else None,
            end_s=frames[-1].end_s if frames else None,
            texts=[frame.text for frame in frames],
            tokens=[frame.text_token for frame in frames],
            is_in_turn=bool(frames) and frames[-1].is_in_turn,
            queue_ms=round(1000 * computed.queue_s, 2),
            compute_ms=round(1000 * computed.compute_s, 2),
            audio=pcm_base64(chunk.audio),
        )

    def _session(self) -> dict[str, object]:
        return {
            "id": self._id,
            "object": "realtime.session",
            "type": "realtime",
            "model": self._settings.model,
            "output_modalities": ["audio"],
            "audio": {
                "input": {"format": FORMAT, "turn_detection": None},
                "output": {"format": FORMAT},
            },
        }

    # Events of the client --------------------------------------------------------------------

    async def _append(
        self, given: Mapping[str, Any], conversation: BufferedConversation
    ) -> list[Sent]:
        try:
            samples = pcm_samples(given["audio"])
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise EventError("audio must be 16-bit PCM in base64", "audio") from error
        for edge in self._speech.push(samples):
            if edge.is_begin:
                self._item_id = new_id("item")
                kind, at = "input_audio_buffer.speech_started", {"audio_start_ms": edge.at_ms}
            else:
                kind, at = "input_audio_buffer.speech_stopped", {"audio_end_ms": edge.at_ms}
            self._due.append(event(kind, **at, item_id=self._item_id))
        await conversation.push(samples)
        return self._speech_events()

    def _speech_events(self) -> list[Sent]:
        due, self._due = self._due, []
        return due

    async def _update(
        self, given: Mapping[str, Any], conversation: BufferedConversation
    ) -> list[Sent]:
        session = given.get("session")
        if not isinstance(session, dict):
            raise EventError("session must be an object", "session")
        for side in ("input", "output"):
            wanted = _field(session, "audio", side, "format")
            if wanted is not None and not _is_known_format(wanted):
                param = f"session.audio.{side}.format"
                raise EventError(f"{param}: only audio/pcm at {RATE_HZ} Hz is supported", param)
        messages: list[Sent] = [event("session.updated", session=self._session())]
        for names, why in NOTICES.items():
            if _field(session, *names):
                text = f"{names[-1]} has no effect: {why}"
                param, code = ".".join(("session", *names)), f"{names[-1]}_ignored"
                cause = given.get("event_id")
                messages.append(error_event(text, code=code, param=param, cause=cause))
        return messages

    async def _cancel(
        self, given: Mapping[str, Any], conversation: BufferedConversation
    ) -> list[Sent]:
        wanted = given.get("response_id")
        if self._response is None or wanted not in (None, self._response.response_id):
            raise EventError("no such response is active", code="response_cancel_not_active")
        conversation.interrupt()
        self._turn.cut()
        return self._end(is_cancelled=True)

    async def _commit(
        self, given: Mapping[str, Any], conversation: BufferedConversation
    ) -> list[Sent]:
        """Nothing waits for it: the model has the audio already."""
        item_id = new_id("item")
        return [event("input_audio_buffer.committed", previous_item_id=None, item_id=item_id)]

    async def _clear(
        self, given: Mapping[str, Any], conversation: BufferedConversation
    ) -> list[Sent]:
        return [event("input_audio_buffer.cleared")]

    async def _create(
        self, given: Mapping[str, Any], conversation: BufferedConversation
    ) -> list[Sent]:
        raise EventError(
            "response.create has no effect: the model begins its turns itself",
            code="response_create_ignored",
        )


HANDLERS: Mapping[str, Handler] = {
    "input_audio_buffer.append": RealtimeProtocol._append,
    "input_audio_buffer.commit": RealtimeProtocol._commit,
    "input_audio_buffer.clear": RealtimeProtocol._clear,
    "session.update": RealtimeProtocol._update,
    "response.cancel": RealtimeProtocol._cancel,
    "response.create": RealtimeProtocol._create,
}
"""What an event of a type does."""


def _field(value: object, *names: str) -> object:
    """A field of nested objects; None if it is not there."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _is_known_format(wanted: object) -> bool:
    if wanted == "pcm16":  # the name of the beta API
        return True
    if not isinstance(wanted, dict):
        return False
    return wanted.get("type") == "audio/pcm" and wanted.get("rate", RATE_HZ) == RATE_HZ
