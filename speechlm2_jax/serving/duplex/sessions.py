"""What the server needs of a model's sessions, and the pool of a model's sessions as such."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:  # JAX takes seconds: it is imported when HTTP is there already
    from speechlm2_jax.inference.sessions.conversation import DuplexFrame
    from speechlm2_jax.inference.sessions.session_pool import PooledSession
    from speechlm2_jax.models.duplex import DuplexS2SModel
    from speechlm2_jax.serving.duplex.options import ConversationOptions


class SessionEndedError(Exception):
    """A session that takes no more audio, or none at all, with the reason."""

    def __init__(self, reason: str, *, is_refused: bool = False) -> None:
        super().__init__(reason)
        self.is_refused = is_refused
        """Whether the session never began, for want of room."""


@dataclass(frozen=True, kw_only=True)
class SessionFacts:
    """What does not change between the sessions of a model."""

    input_hz: int
    """Rate of the user's samples."""
    output_hz: int
    """Rate of the agent's samples."""
    chunk_samples: int
    """The user's samples that are computed together."""
    frame_s: float
    bos: int
    """The text token that begins a turn of the agent."""
    eos: int
    latency_s: float
    """The longest time from a frame's end to the end of the chunk that it waits for."""

    @property
    def chunk_s(self) -> float:
        """Seconds of audio that are computed together."""
        return self.chunk_samples / self.input_hz


class Sessions(Protocol):
    """The sessions of one model on one device. The device thread alone calls its methods."""

    @property
    def facts(self) -> SessionFacts:
        """What does not change."""
        ...

    def open(self) -> int:
        """Starts a conversation and returns its number. Raises SessionEndedError without room."""
        ...

    def close(self, session: int) -> None:
        """Ends a conversation; its number may be given again."""
        ...

    def interrupt(self, session: int) -> None:
        """Ends the agent's turn as of the next frame."""
        ...

    def step(
        self, chunks: "Mapping[int, Float[np.ndarray, ' S']]"
    ) -> "Mapping[int, list[DuplexFrame] | SessionEndedError]":
        """Computes the frames of one chunk of each of some conversations."""
        ...


class PoolSessions:
    """The sessions of a pool: one compiled step for all of them."""

    def __init__(self, model: "DuplexS2SModel", options: "ConversationOptions") -> None:
        from speechlm2_jax.generation.sampling import SamplingConfig

        is_random = options.temperature > 0
        sampling = SamplingConfig(
            do_sample=is_random, temperature=options.temperature if is_random else 1.0
        )
        self._pool = model.session_pool(
            slots=options.max_sessions,
            max_load=options.max_load,
            session_window_s=options.session_window_s,
            text_sampling=sampling,
            audio_sampling=sampling,
        )
        self._seed = options.seed
        self._open: dict[int, PooledSession] = {}
        plan, frame_s = self._pool.plan, model.token_equivalent_duration
        self.facts = SessionFacts(
            input_hz=model.sampling_rate,
            output_hz=model.target_sampling_rate,
            chunk_samples=plan.samples,
            frame_s=frame_s,
            bos=model.turn_ids.bos,
            eos=model.turn_ids.eos,
            latency_s=(plan.frames - 1 + plan.delay) * frame_s,
        )

    def open(self) -> int:
        """Starts a conversation. Raises SessionEndedError if the device has no time for it."""
        from speechlm2_jax.inference.sessions.session_pool import SessionRefusedError

        try:
            session = self._pool.join(seed=self._seed)
        except SessionRefusedError as error:
            raise SessionEndedError(str(error), is_refused=True) from error
        self._open[session.slot] = session
        return session.slot

    def close(self, session: int) -> None:
        """Ends a conversation and frees its slot."""
        self._open.pop(session).leave()

    def interrupt(self, session: int) -> None:
        """Ends the agent's turn as of the next frame."""
        self._open[session].interrupt()

    def step(
        self, chunks: "Mapping[int, Float[np.ndarray, ' S']]"
    ) -> "Mapping[int, list[DuplexFrame] | SessionEndedError]":
        """Computes one chunk of each conversation in one step."""
        found: dict[int, list[DuplexFrame] | SessionEndedError] = {}
        for number, chunk in chunks.items():
            try:
                self._open[number].feed(chunk)
            except ValueError as error:  # learnt positions limit a conversation
                found[number] = SessionEndedError(str(error))
        for session, frames in self._pool.step().items():
            found[session.slot] = frames
        return found
