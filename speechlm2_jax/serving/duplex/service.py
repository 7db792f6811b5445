"""The state of a server of conversations: its model, its device thread, and who may enter."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from speechlm2_jax.serving.duplex.conversation import BufferedConversation
from speechlm2_jax.serving.duplex.device import DeviceLoop
from speechlm2_jax.serving.duplex.metrics import ConversationMetrics
from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.duplex.protocol import TRY_LATER, CloseError
from speechlm2_jax.serving.duplex.sessions import SessionEndedError, SessionFacts, Sessions
from speechlm2_jax.serving.model_service import ModelService

log = logging.getLogger(__name__)
OpenSessions = Callable[[ConversationOptions], Sessions]


class ConversationService(ModelService):
    """One duplex model behind one address."""

    def __init__(self, options: ConversationOptions, open_sessions: OpenSessions) -> None:
        super().__init__(options)
        self.options, self.metrics = options, ConversationMetrics()
        self.metrics.watch(lambda: self.active, options.max_sessions)
        self.device: DeviceLoop | None = None
        self.facts: SessionFacts | None = None
        self._open_sessions = open_sessions

    def stop(self) -> None:
        """Ends the device thread after its present round."""
        super().stop()
        if self.device is not None:
            self.device.stop()

    def check_room(self) -> None:
        """Raises CloseError if the model is not ready, or all places are taken."""
        if (why := self.why_unready) is not None:
            raise CloseError(TRY_LATER, f"the server is not ready: {why}")
        if self.active >= self.options.max_sessions:
            raise CloseError(
                TRY_LATER, f"{self.active} conversations are under way, the most at once"
            )

    @contextmanager
    def conversation(self, user_hz: int) -> Iterator[BufferedConversation]:
        """A conversation, which ends with the block. Raises CloseError if there is no room."""
        self.check_room()
        assert self.device is not None and self.facts is not None
        self.active += 1
        own = BufferedConversation(self.device, self.facts, self.options, self.metrics, user_hz)
        try:
            yield own
        finally:
            own.close()
            self.active -= 1

    def prepare(self) -> Callable[[], None]:
        """Loads the model and compiles its step; returns the loop of the device thread."""
        sessions = self._open_sessions(self.options)
        self._show("the step of a session")
        warm_up(sessions)
        self.facts, self.device = sessions.facts, DeviceLoop(sessions)
        return self.device.run


def warm_up(sessions: Sessions) -> None:
    """Runs two chunks of a conversation, so that none waits for a compilation."""
    import numpy as np

    try:
        number = sessions.open()
    except SessionEndedError as error:  # it may be less busy later
        log.warning("%s", error)
        return
    for _ in range(2):
        sessions.step({number: np.zeros(sessions.facts.chunk_samples, np.float32)})
    sessions.close(number)
