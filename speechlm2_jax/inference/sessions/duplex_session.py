"""A conversation with a full-duplex model: samples of any number in, the agent's frames out."""

import time
from collections import deque
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.inference.sessions.conversation import (
    DuplexFrame,
    LiveConversation,
    SessionSettings,
)
from speechlm2_jax.inference.sessions.duplex_step import (
    SessionProgram,
    SessionWeights,
    UserChunk,
    make_start,
    make_step,
)


class DuplexSession:
    """One conversation. `model.session()` makes it.

    ```python
    session = model.session()
    for frame in session.push(samples):   # any number of samples [S] within [-1, 1]
        play(frame.audio)
    ```

    The frames of all pushes and of `finish` equal `offline_inference` on the same audio.
    """

    def __init__(
        self, program: SessionProgram, weights: SessionWeights, settings: SessionSettings
    ) -> None:
        self._program, self._weights, self._settings = program, weights, settings
        self._start, self._step = make_start(program), make_step(program)
        self.reset()

    @property
    def chunk_s(self) -> float:
        """Seconds of audio that are computed together: one attention chunk of the encoder."""
        return self._conversation.chunk_s

    @property
    def latency_s(self) -> float:
        """The longest time from the end of a frame's audio to the end of the last needed chunk."""
        return self._conversation.latency_s

    @property
    def state_bytes(self) -> int:
        """Bytes of the conversation's state on the device. It does not grow."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state))

    @property
    def is_in_turn(self) -> bool:
        """Whether the agent has begun a turn and not ended it, by its text tokens."""
        return self._conversation.is_in_turn

    def push(self, samples: ArrayLike) -> Iterator[DuplexFrame]:
        """Takes the user's next samples [S] and iterates over the frames that they complete.

        The samples are taken at once; each chunk is computed when its first frame is asked for.
        Raises ValueError for samples that are not finite floats of rank 1, after `finish`, and for
        a conversation longer than the model's `max_frames`.
        """
        self._conversation.push(samples)
        return self._computed()

    def finish(self) -> Iterator[DuplexFrame]:
        """Ends the user's audio and iterates over the last frames, as `offline_inference` has them.

        Raises ValueError after an earlier `finish`.
        """
        self._conversation.finish()
        return self._computed()

    def interrupt(self) -> None:
        """Ends the agent's turn, as of the next frame; without a turn it does nothing.

        The next frame reads the end-of-turn token in place of the last text token, and its codes
        are those of the end of a turn, which decode to silence.
        """
        self._conversation.interrupt()

    def reset(self) -> None:
        """Starts another conversation with the same options; no program is compiled again."""
        settings = self._settings
        self._state = self._start(self._weights.network, jnp.asarray(settings.silence))
        self._conversation = LiveConversation(self._program.plan, settings)
        self._ready = deque[DuplexFrame]()

    def _computed(self) -> Iterator[DuplexFrame]:
        """The frames of past chunks, which an iteration that was broken off left, and of new."""
        yield from self._drained()
        while self._conversation.has_chunk:
            self._run()
            yield from self._drained()

    def _drained(self) -> Iterator[DuplexFrame]:
        while self._ready:
            yield self._ready.popleft()

    def _run(self) -> None:
        """Runs one chunk."""
        begun, waiting = time.perf_counter(), self._conversation.next_input()
        chunk = UserChunk(
            audio=jnp.asarray(waiting.audio[None]),
            new=jnp.full(1, waiting.new, jnp.int32),
            is_interrupted=jnp.full(1, waiting.is_interrupted),
        )
        weights = self._weights
        output, self._state = self._step(
            weights.network, weights.codec, self._state, chunk, self._settings.rngs
        )
        frames = jax.device_get(output)
        compute_s = time.perf_counter() - begun
        self._ready.extend(self._conversation.frames(frames, 0, compute_s))
