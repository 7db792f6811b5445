"""The server's events of OpenAI's Realtime API, as JSON."""

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

RATE_HZ = 24_000
FORMAT: Mapping[str, object] = {"type": "audio/pcm", "rate": RATE_HZ}
MAX_PCM = (1 << 15) - 1


def new_id(kind: str) -> str:
    """An id such as `event_5f1c...`."""
    return f"{kind}_{secrets.token_hex(10)}"


def event(kind: str, **fields: object) -> str:
    """An event with an id of its own."""
    return json.dumps({"type": kind, "event_id": new_id("event"), **fields})


def error_event(
    message: str, *, code: str | None = None, param: str | None = None, cause: str | None = None
) -> str:
    """An `error` event. `cause` is the id of the client's event."""
    error = {
        "type": "invalid_request_error",
        "message": message,
        "code": code,
        "param": param,
        "event_id": cause,
    }
    return event("error", error=error)


def pcm_base64(samples: Float[np.ndarray, " S"]) -> str:
    """Samples [S] within [-1, 1] as 16-bit PCM, little-endian, in base64."""
    whole = np.round(np.clip(samples, -1.0, 1.0) * MAX_PCM).astype("<i2")
    return base64.b64encode(whole.tobytes()).decode()


def pcm_samples(text: str) -> Float[np.ndarray, " S"]:
    """The samples of 16-bit PCM in base64. Raises ValueError for anything else."""
    data = base64.b64decode(text, validate=True)
    if len(data) % 2:
        raise ValueError("16-bit samples have an even number of bytes")
    return np.frombuffer(data, "<i2").astype(np.float32) / (MAX_PCM + 1)


@dataclass
class ResponseEvents:
    """The events of one response: a turn of the agent."""

    response_id: str = field(default_factory=lambda: new_id("resp"))
    item_id: str = field(default_factory=lambda: new_id("item"))
    transcript: str = ""

    def begin(self) -> list[str]:
        """The events of its start."""
        item = self._item("in_progress", [])
        at = {"response_id": self.response_id, "output_index": 0}
        part = {"type": "audio", "transcript": ""}
        return [
            event("response.created", response=self._response("in_progress", [])),
            event("response.output_item.added", **at, item=item),
            event("conversation.item.added", previous_item_id=None, item=item),
            event("response.content_part.added", **self._at, part=part),
        ]

    def audio(self, samples: Float[np.ndarray, " S"]) -> list[str]:
        """The event of more audio; none if there is none."""
        if not len(samples):
            return []
        return [event("response.output_audio.delta", **self._at, delta=pcm_base64(samples))]

    def text(self, text: str) -> list[str]:
        """The event of more text; none if there is none."""
        self.transcript += text
        if not text:
            return []
        return [event("response.output_audio_transcript.delta", **self._at, delta=text)]

    def end(self, *, is_cancelled: bool) -> list[str]:
        """The events of its end."""
        status = "incomplete" if is_cancelled else "completed"
        item = self._item(status, [{"type": "output_audio", "transcript": self.transcript}])
        at = {"response_id": self.response_id, "output_index": 0}
        part = {"type": "audio", "transcript": self.transcript}
        whole = self._response("cancelled" if is_cancelled else "completed", [item])
        if is_cancelled:
            whole["status_details"] = {"type": "cancelled", "reason": "client_cancelled"}
        return [
            event("response.output_audio.done", **self._at),
            event("response.output_audio_transcript.done", **self._at, transcript=self.transcript),
            event("response.content_part.done", **self._at, part=part),
            event("response.output_item.done", **at, item=item),
            event("conversation.item.done", previous_item_id=None, item=item),
            event("response.done", response=whole),
        ]

    @property
    def _at(self) -> dict[str, object]:
        return {
            "response_id": self.response_id,
            "item_id": self.item_id,
            "output_index": 0,
            "content_index": 0,
        }

    def _item(self, status: str, content: list[dict[str, str]]) -> dict[str, object]:
        return {
            "id": self.item_id,
            "object": "realtime.item",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _response(self, status: str, output: list[dict[str, object]]) -> dict[str, Any]:
        return {
            "id": self.response_id,
            "object": "realtime.response",
            "status": status,
            "status_details": None,
            "output": output,
            "output_modalities": ["audio"],
            "audio": {"output": {"format": FORMAT}},
        }
