"""Moshi's protocol: binary messages, of which the first byte tells the kind.

0 handshake, 1 Ogg Opus, 2 text, 3 control, 4 metadata as JSON, 5 error, 6 ping. Kinds that are not
known are left out, as its specification asks for.
"""

import json
import struct
from collections.abc import Sequence

from speechlm2_jax.serving.duplex.conversation import AgentChunk, BufferedConversation
from speechlm2_jax.serving.duplex.metrics import ConversationMetrics
from speechlm2_jax.serving.duplex.ogg import OggError
from speechlm2_jax.serving.duplex.opus import GRANULE_HZ, OpusReader, OpusWriter
from speechlm2_jax.serving.duplex.protocol import (
    INVALID,
    UNSUPPORTED,
    CloseError,
    Protocol,
    Sent,
)

HANDSHAKE, AUDIO, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
END_TURN, RESTART = 1, 3
"""Controls that have an effect: the agent's turn ends; the conversation begins anew."""


class MoshiProtocol(Protocol):
    """One connection of `/api/chat`."""

    NAME, USER_HZ = "moshi", GRANULE_HZ

    def __init__(self, metrics: ConversationMetrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._reader, self._writer = OpusReader(), OpusWriter()

    def greeting(self) -> Sequence[Sent]:
        """The handshake, with versions of protocol and model, and the model's name."""
        name = json.dumps({"model": self._model}).encode()
        return [bytes([HANDSHAKE]) + struct.pack("<II", 0, 0), bytes([METADATA]) + name]

    async def receive(self, message: Sent, conversation: BufferedConversation) -> Sequence[Sent]:
        """Takes a message. Raises CloseError for a text message and for what is no Ogg Opus."""
        if isinstance(message, str):
            raise CloseError(UNSUPPORTED, "messages must be binary: a byte of its kind comes first")
        kind, payload = message[0] if message else None, message[1:]
        if kind == AUDIO:
            try:
                samples = self._reader.push(payload)
            except OggError as error:
                self._metrics.bad_messages.inc()
                raise CloseError(INVALID, f"audio must be Ogg Opus: {error}") from error
            await conversation.push(samples)
        elif kind == CONTROL and payload[:1] == bytes([END_TURN]):
            conversation.interrupt()
        elif kind == CONTROL and payload[:1] == bytes([RESTART]):
            conversation.reset()
        elif kind == PING:
            return [bytes([PING])]
        elif kind is None or kind > PING:
            self._metrics.bad_messages.inc()
        return []

    def agent(self, chunk: AgentChunk) -> Sequence[Sent]:
        """Audio of all frames, in turns and between them, and the new text."""
        pages = self._writer.push(chunk.audio)
        text = "".join(frame.text for frame in chunk.frames)
        messages: list[Sent] = [bytes([AUDIO]) + pages] if pages else []
        return [*messages, *([bytes([TEXT]) + text.encode()] if text else [])]

    def farewell(self, error: CloseError) -> Sequence[Sent]:
        """The error in words."""
        return [bytes([ERROR]) + error.reason.encode()]
