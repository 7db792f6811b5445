"""What both protocols have in common: how a connection reads and writes messages."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from speechlm2_jax.serving.duplex.conversation import AgentChunk, BufferedConversation
from speechlm2_jax.serving.duplex.sessions import SessionFacts

Sent = str | bytes
"""A message of the server: text or binary."""

POLICY, UNSUPPORTED, INVALID, TRY_LATER = 1008, 1003, 1007, 1013
FAULT = 1011


class CloseError(Exception):
    """A connection that is closed by the server: a code of RFC 6455, and the reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Protocol(ABC):
    """One connection's messages."""

    NAME: ClassVar[str]
    USER_HZ: ClassVar[int]
    """Rate of the user's samples."""

    @abstractmethod
    def greeting(self) -> Sequence[Sent]:
        """The first messages of the server."""

    @abstractmethod
    async def receive(self, message: Sent, conversation: BufferedConversation) -> Sequence[Sent]:
        """Acts on a message of the client; returns what to send. Raises CloseError."""

    @abstractmethod
    def agent(self, chunk: AgentChunk) -> Sequence[Sent]:
        """The messages of a chunk of the agent's."""

    @abstractmethod
    def farewell(self, error: CloseError) -> Sequence[Sent]:
        """What is sent before the connection is closed because of an error."""


class TurnTracker:
    """Whether the agent is in a turn, by its text tokens and the interruptions."""

    def __init__(self, facts: SessionFacts) -> None:
        self._bos, self._eos = facts.bos, facts.eos
        self.is_in_turn = False

    def next(self, token: int) -> tuple[bool, bool]:
        """Takes a frame's text token; returns whether a turn begins and whether one ends."""
        before = self.is_in_turn
        self.is_in_turn = token == self._bos or (before and token != self._eos)
        return self.is_in_turn and not before, before and not self.is_in_turn

    def cut(self) -> None:
        """Ends the turn at once: what comes of it still is not part of one."""
        self.is_in_turn = False
