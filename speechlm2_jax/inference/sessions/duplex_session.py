"""A conversation with a full-duplex model: samples of any number in, the agent's frames out."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.data.audio import check_samples
from speechlm2_jax.data.stream_resampler import StreamResampler
from speechlm2_jax.inference.sessions.duplex_step import (
    SessionFrames,
    SessionProgram,
    SessionWeights,
    UserChunk,
    make_start,
    make_step,
)
from speechlm2_jax.inference.text_stream import RunningText, TextTokenizer
from speechlm2_jax.networks.channels import TextIds


@dataclass(frozen=True, kw_only=True)
class DuplexFrame:
    """The agent's output for one frame (80 ms) of user audio."""

    index: int
    """Number of frames before it."""
    text_token: int
    text: str
    """New text. It is empty for control tokens, and while tokens form an incomplete character."""
    codes: Int32[np.ndarray, " K"]
    """Audio codes, control codes included."""
    audio: Float[np.ndarray, " A"]
    """Samples at the model's `target_sampling_rate`; none in a session without audio."""
    is_in_turn: bool
    """Whether the agent's turn goes on after this frame's text token."""
    start_s: float
    """Where its user audio starts, in seconds since the session's start."""
    end_s: float
    known_s: float
    """Seconds of user audio after which the frame was computed."""
    compute_s: float
    """Time that its chunk took to compute; a chunk may have several frames."""


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """What a session knows of its model besides the programs."""

    tokenizer: TextTokenizer
    text: TextIds
    input_hz: int
    """Rate of the samples that are pushed."""
    model_hz: int
    """Rate of the samples that the encoder reads."""
    frame_s: float
    silence: Int32[Array | np.ndarray, " K"]
    """The codec's codes of silence."""
    max_frames: int | None
    """Most frames of a conversation; None: no limit."""
    rngs: Key[Array, " B"] | None
    """Random keys of sampling; None: greedy."""


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
        return self._program.plan.samples / self._settings.model_hz

    @property
    def latency_s(self) -> float:
        """The longest time from the end of a frame's audio to the end of the last needed chunk."""
        plan = self._program.plan
        frames_s = (plan.frames - 1 + plan.delay) * self._settings.frame_s
        return frames_s + self._resampler.delay_s

    @property
    def state_bytes(self) -> int:
        """Bytes of the conversation's state on the device. It does not grow."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state))

    @property
    def is_in_turn(self) -> bool:
        """Whether the agent has begun a turn and not ended it, by its text tokens."""
        return self._is_in_turn

    def push(self, samples: ArrayLike) -> Iterator[DuplexFrame]:
        """Takes the user's next samples [S] and iterates over the frames that they complete.

        The samples are taken at once; each chunk is computed when its first frame is asked for.
        Raises ValueError for samples that are not finite floats of rank 1, after `finish`, and for
        a conversation longer than the model's `max_frames`.
        """
        if self._is_finished:
            raise ValueError("the session has ended; call reset() to start another conversation")
        self._take(self._resampler.push(_checked(samples)))
        return self._whole_chunks()

    def finish(self) -> Iterator[DuplexFrame]:
        """Ends the user's audio and iterates over the last frames, as `offline_inference` has them.

        Raises ValueError after an earlier `finish`.
        """
        if self._is_finished:
            raise ValueError("the session has ended; call reset() to start another conversation")
        self._take(self._resampler.finish())
        self._is_finished = True
        return self._last_chunks()

    def interrupt(self) -> None:
        """Ends the agent's turn, as of the next frame; without a turn it does nothing.

        The next frame reads the end-of-turn token in place of the last text token, and its codes
        are those of the end of a turn, which decode to silence.
        """
        self._is_interrupted = self._is_in_turn

    def reset(self) -> None:
        """Starts another conversation with the same options; no program is compiled again."""
        settings = self._settings
        self._state = self._start(self._weights.network, jnp.asarray(settings.silence))
        self._resampler = StreamResampler(settings.input_hz, settings.model_hz)
        self._text = RunningText(settings.tokenizer)
        self._waiting = np.zeros(0, np.float32)
        self._ready = deque[DuplexFrame]()
        self._taken = self._steps = self._frames = 0
        self._is_finished = self._is_in_turn = self._is_interrupted = False

    def _take(self, samples: Float[np.ndarray, " S"]) -> None:
        limit = self._settings.max_frames
        frames = self._program.plan.config.frame_count(self._taken + len(samples))
        if limit is not None and frames > limit:
            raise ValueError(
                f"the conversation has more than the {limit} frames for which the speech decoder "
                "has learnt positions (model.speech_decoder.max_length_causal_mask); call reset()"
            )
        self._waiting = np.concatenate([self._waiting, samples])
        self._taken += len(samples)

    def _whole_chunks(self) -> Iterator[DuplexFrame]:
        samples = self._program.plan.samples
        yield from self._computed()
        while len(self._waiting) >= samples:
            self._run(samples)
            yield from self._computed()

    def _last_chunks(self) -> Iterator[DuplexFrame]:
        plan = self._program.plan
        yield from self._computed()
        while self._steps < plan.steps_for(self._taken):
            self._run(min(len(self._waiting), plan.samples))
            yield from self._computed()

    def _computed(self) -> Iterator[DuplexFrame]:
        """Frames of past chunks, which an iteration that was broken off left."""
        while self._ready:
            yield self._ready.popleft()

    def _run(self, samples: int) -> None:
        """Runs one chunk of so many waiting samples."""
        begun, size = time.perf_counter(), self._program.plan.samples
        wave = np.zeros((1, size), np.float32)
        wave[0, :samples] = self._waiting[:samples]
        self._waiting = self._waiting[samples:]
        chunk = UserChunk(
            audio=jnp.asarray(wave),
            new=jnp.full(1, samples, jnp.int32),
            is_interrupted=jnp.asarray(self._is_interrupted),
        )
        self._is_interrupted = False
        weights = self._weights
        output, self._state = self._step(
            weights.network, weights.codec, self._state, chunk, self._settings.rngs
        )
        self._steps += 1
        frames = jax.device_get(output)
        known_s = min(self._steps * size, self._taken) / self._settings.model_hz
        compute_s = time.perf_counter() - begun
        for t in np.flatnonzero(frames.is_real[0]).tolist():
            self._ready.append(self._frame(frames, t, known_s, compute_s))

    def _frame(
        self, frames: SessionFrames, t: int, known_s: float, compute_s: float
    ) -> DuplexFrame:
        index, token, ids = self._frames, int(frames.text[0, t]), self._settings.text
        self._frames += 1
        self._is_in_turn = token == ids.bos or (self._is_in_turn and token != ids.eos)
        is_control = token in (ids.pad, ids.bos, ids.eos)
        plan = self._program.plan
        is_last = self._is_finished and self._frames == plan.config.frame_count(self._taken)
        text = "" if is_control else self._text.add(token)
        frame_s = self._settings.frame_s
        return DuplexFrame(
            index=index,
            text_token=token,
            text=text + (self._text.finish() if is_last else ""),
            codes=np.asarray(frames.codes[0, t]),
            audio=np.asarray(frames.audio[0, t]),
            is_in_turn=self._is_in_turn,
            start_s=index * frame_s,
            end_s=(index + 1) * frame_s,
            known_s=known_s,
            compute_s=compute_s,
        )


def _checked(samples: ArrayLike) -> Float[np.ndarray, " S"]:
    wave = np.asarray(samples)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(
            f"samples must be floats [S] within [-1, 1], got {wave.dtype} {list(wave.shape)}"
        )
    wave = wave.astype(np.float32)
    return check_samples(wave, "samples") if len(wave) else wave
