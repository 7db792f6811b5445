"""Many conversations at once: sessions share the slots of one compiled step."""

import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.inference.duplex_programs import conversation_rngs
from speechlm2_jax.inference.sessions.conversation import (
    DuplexFrame,
    LiveConversation,
    SessionSettings,
    WaitingChunk,
)
from speechlm2_jax.inference.sessions.duplex_step import (
    SessionFrames,
    SessionProgram,
    SessionWeights,
    UserChunk,
    make_restart,
    make_start,
    make_step,
)
from speechlm2_jax.inference.sessions.step_times import StepTimes

WARMUP_STEPS = 16
"""Steps that are timed before the first session joins."""


class SessionRefusedError(RuntimeError):
    """No further session fits into a pool. The message tells why."""


@dataclass(frozen=True, kw_only=True)
class PoolLimits:
    """When a pool takes no further session."""

    slots: int
    max_load: float
    """Largest 95th percentile of the time of a step, as a fraction of the chunk's duration."""

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots={self.slots} must be at least 1")
        if not self.max_load > 0:
            raise ValueError(f"max_load={self.max_load} must be greater than 0")


@jax.jit
def _put_rng(
    rngs: Key[Array, " B"], rng: Key[Array, " 1"], slot: Int[Array, ""]
) -> Key[Array, " B"]:
    return rngs.at[slot].set(rng[0])


class DuplexSessionPool:
    """Conversations that share one compiled step of a fixed number of slots.

    `model.session_pool(slots=N)` makes it.

    ```python
    pool = model.session_pool(slots=6)
    session = pool.join(sampling_rate=48000)   # raises SessionRefusedError if there is no room
    session.feed(samples)                      # any number of samples [S] within [-1, 1]
    for session, frames in pool.step().items():
        ...                                    # frames of every session with a chunk waiting
    session.leave()
    ```

    Frames are those that `model.session()` gives for the same samples, whatever the other sessions
    do. Nothing locks: at any time one thread at most may be inside the pool or one of its sessions.
    """

    def __init__(
        self,
        program: SessionProgram,
        weights: SessionWeights,
        settings: SessionSettings,
        limits: PoolLimits,
    ) -> None:
        self.plan, self._program, self._weights = program.plan, program, weights
        self._settings, self._limits = settings, limits
        self._silence = jnp.asarray(settings.silence)
        self._step, self._restart = make_step(program), make_restart(program)
        self._state = make_start(program, limits.slots)(weights.network, self._silence)
        self._sessions: list[PooledSession | None] = [None] * limits.slots
        is_random = settings.rngs is not None
        self._rngs = conversation_rngs(jax.random.key(0), limits.slots) if is_random else None
        self._times = StepTimes()
        self.restart(0, seed=0)
        self._run(self._silent_chunks())  # compiles the step
        self.measure()

    @property
    def slots(self) -> int:
        """The largest number of sessions."""
        return self._limits.slots

    @property
    def sessions(self) -> tuple["PooledSession", ...]:
        """The sessions that have joined and not left."""
        return tuple(session for session in self._sessions if session is not None)

    @property
    def chunk_s(self) -> float:
        """Seconds of audio of a step: the real-time budget of its computation."""
        return self.plan.samples / self._settings.model_hz

    @property
    def step_p95_s(self) -> float:
        """95th percentile of the time of the last steps."""
        return self._times.p95_s

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all slots on the device. It does not grow."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state))

    def refusal(self) -> str | None:
        """Why no session can join now; None if one can.

        A pool without sessions measures its step again if it was too slow: that takes a few steps.
        """
        if None not in self._sessions:
            return f"all {self.slots} slots are taken"
        if self._is_too_slow and not self.sessions:
            self.measure()
        if self._is_too_slow:
            return (
                f"a step takes {1e3 * self.step_p95_s:.1f} ms (95th percentile), more than "
                f"{self._limits.max_load:g} of the {1e3 * self.chunk_s:.0f} ms of a chunk"
            )
        return None

    def can_join(self) -> bool:
        """Whether `join` would take a session now; see `refusal`."""
        return self.refusal() is None

    def join(self, *, sampling_rate: int | None = None, seed: int = 0) -> "PooledSession":
        """Starts a conversation in a free slot.

        `sampling_rate` is that of the samples, by default the model's; `seed` is that of sampling.
        Raises SessionRefusedError if all slots are taken, or if the measured time of a step leaves
        no room in real time.
        """
        reason = self.refusal()
        if reason is not None:
            raise SessionRefusedError(f"no session can join: {reason}")
        slot = self._sessions.index(None)
        settings = replace(self._settings, input_hz=sampling_rate or self._settings.input_hz)
        session = PooledSession(self, slot, settings, seed)
        self._sessions[slot] = session
        return session

    def step(self) -> dict["PooledSession", list[DuplexFrame]]:
        """Runs one chunk of every session that has one waiting; returns their new frames.

        Sessions without a waiting chunk are not in the result. A session whose chunk completes no
        frame has an empty list. Without any waiting chunk nothing is computed.
        """
        begun = time.perf_counter()
        ready = {s.slot: s.conversation for s in self.sessions if s.conversation.has_chunk}
        if not ready:
            return {}
        output = self._run({slot: ready[slot].next_input() for slot in ready})
        compute_s = time.perf_counter() - begun
        self._times.add(compute_s)
        return {
            session: session.conversation.frames(output, session.slot, compute_s)
            for session in self.sessions
            if session.slot in ready
        }

    def measure(self) -> None:
        """Times the step with all slots busy, in a pool without sessions."""
        if self.sessions:
            raise ValueError("measure() needs a pool without sessions; their steps are timed")
        self._times = StepTimes()
        for _ in range(WARMUP_STEPS):
            begun = time.perf_counter()
            self._run(self._silent_chunks())
            self._times.add(time.perf_counter() - begun)

    def restart(self, slot: int, *, seed: int) -> None:
        """Puts a slot before its first chunk. Sessions call it."""
        self._state = self._restart(
            self._weights.network, self._silence, self._state, jnp.asarray(slot)
        )
        if self._rngs is not None:
            rng = conversation_rngs(jax.random.key(seed), 1)
            self._rngs = _put_rng(self._rngs, rng, jnp.asarray(slot))

    def release(self, slot: int) -> None:
        """Frees a slot. Sessions call it."""
        self._sessions[slot] = None

    @property
    def _is_too_slow(self) -> bool:
        return self.step_p95_s > self._limits.max_load * self.chunk_s

    def _silent_chunks(self) -> dict[int, WaitingChunk]:
        samples = self.plan.samples
        silence = WaitingChunk(np.zeros(samples, np.float32), samples, is_interrupted=False)
        return dict.fromkeys(range(self.slots), silence)

    def _run(self, chunks: dict[int, WaitingChunk]) -> SessionFrames:
        """Runs a step on the chunks of some slots; the output is on the host."""
        audio = np.zeros((self.slots, self.plan.samples), np.float32)
        new = np.zeros(self.slots, np.int32)
        is_interrupted, is_active = np.zeros((2, self.slots), bool)
        for slot, chunk in chunks.items():
            audio[slot], new[slot], is_interrupted[slot] = chunk
            is_active[slot] = True
        arrays = jax.device_put((audio, new, is_interrupted, is_active))
        names = ("audio", "new", "is_interrupted", "is_active")
        given = UserChunk(**dict(zip(names, arrays, strict=True)))
        weights = self._weights
        output, self._state = self._step(
            weights.network, weights.codec, self._state, given, self._rngs
        )
        return jax.device_get(output)


class PooledSession:
    """One conversation of a `DuplexSessionPool`, whose `join` makes it."""

    def __init__(
        self, pool: DuplexSessionPool, slot: int, settings: SessionSettings, seed: int
    ) -> None:
        self._pool, self._settings, self._seed = pool, settings, seed
        self.slot = slot
        self._has_left = False
        self.reset()

    @property
    def chunk_s(self) -> float:
        """Seconds of audio that are computed together."""
        return self._pool.chunk_s

    @property
    def latency_s(self) -> float:
        """The longest time from the end of a frame's audio to the end of the last needed chunk."""
        return self.conversation.latency_s

    @property
    def state_bytes(self) -> int:
        """Bytes of this conversation's state on the device. It does not grow."""
        return self._pool.state_bytes // self._pool.slots

    @property
    def is_in_turn(self) -> bool:
        """Whether the agent has begun a turn and not ended it, by its text tokens."""
        return self.conversation.is_in_turn

    @property
    def has_chunk(self) -> bool:
        """Whether the next `pool.step()` runs a chunk of this session."""
        return self.conversation.has_chunk

    @property
    def is_complete(self) -> bool:
        """Whether the user's audio has ended and all frames have been computed."""
        return self.conversation.is_finished and not self.conversation.has_chunk

    def feed(self, samples: ArrayLike) -> None:
        """Takes the user's next samples [S]; `pool.step()` computes their frames.

        Raises ValueError as `DuplexSession.push`, and after `leave`.
        """
        self._check_joined()
        self.conversation.push(samples)

    def finish(self) -> None:
        """Ends the user's audio; `pool.step()` computes the last frames until `is_complete`.

        Raises ValueError after an earlier `finish`, and after `leave`.
        """
        self._check_joined()
        self.conversation.finish()

    def interrupt(self) -> None:
        """Ends the agent's turn, as of the next frame; see `DuplexSession.interrupt`."""
        self._check_joined()
        self.conversation.interrupt()

    def reset(self) -> None:
        """Starts another conversation in the same slot; samples that wait are dropped."""
        self._check_joined()
        self._pool.restart(self.slot, seed=self._seed)
        self.conversation = LiveConversation(self._pool.plan, self._settings)

    def leave(self) -> None:
        """Frees the slot for another session. It may be called again."""
        if not self._has_left:
            self._pool.release(self.slot)
        self._has_left = True

    def _check_joined(self) -> None:
        if self._has_left:
            raise ValueError("the session has left its pool; join() gives another one")
