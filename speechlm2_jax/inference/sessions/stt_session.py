"""A conversation with a duplex speech-to-text model: samples of any number in, text frames out."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.generation.forced_turns import ForcedTurns
from speechlm2_jax.inference.sessions.opening import SINKS
from speechlm2_jax.inference.sessions.stt_step import (
    SttSessionFrames,
    SttSessionProgram,
    make_start,
    make_step,
)
from speechlm2_jax.inference.sessions.waiting_audio import WaitingAudio
from speechlm2_jax.inference.text_stream import RunningText, TextTokenizer
from speechlm2_jax.layers.unstacked import Layered
from speechlm2_jax.llm import caches
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.networks.duplex_stt import DuplexStt, DuplexSttConfig
from speechlm2_jax.perception import streaming
from speechlm2_jax.perception.streaming import StreamPlan


@dataclass(frozen=True, kw_only=True)
class SttFrame:
    """The model's output for one frame (80 ms) of user audio."""

    index: int
    """Number of frames before it."""
    text_token: int
    text: str
    """New text of the agent. Empty for control tokens, and while a character is incomplete."""
    user_text_token: int
    """The pad token without a user-text head."""
    user_text: str
    is_in_turn: bool
    """Whether the agent's turn goes on after this frame's token."""
    start_s: float
    """Where its user audio starts, in seconds since the session's start."""
    end_s: float
    known_s: float
    """Seconds of user audio after which the frame was computed."""
    compute_s: float
    """Time that its chunk took to compute; a chunk may have several frames."""


@dataclass(frozen=True, kw_only=True)
class SttSessionOptions:
    """The arguments of `model.session`, and what it knows of its model."""

    tokenizer: TextTokenizer
    prompt: tuple[int, ...]
    """Tokens of the system prompt."""
    input_hz: int
    """Rate of the samples that are pushed."""
    window_s: float
    rule: ForcedTurns | None


class SttSession:
    """One conversation. `model.session()` makes it.

    ```python
    session = model.session(system_prompt="You take orders.")
    for frame in session.push(samples):   # any number of samples [S] within [-1, 1]
        print(frame.text, end="")
    ```

    The frames of all pushes and of `finish` equal `offline_inference` on the same audio, as long as
    the conversation is within the window. Raises ValueError, naming the setting, for a model that
    cannot stream.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[DuplexStt],
        config: DuplexSttConfig,
        variables: Layered,
        options: SttSessionOptions,
    ) -> None:
        frames = int(options.window_s / config.perception.token_equivalent_duration + 1e-6)
        if frames < 1:
            raise ValueError(f"session_window_s={options.window_s} must be at least a frame")
        sinks = SINKS + len(options.prompt)
        self._program = SttSessionProgram(
            graphdef=graphdef,
            plan=_plan(config),
            rule=options.rule,
            capacity=sinks + frames,
            sinks=sinks,
        )
        self._config, self._variables, self._options = config, variables, options
        self._start, self._step = make_start(self._program), make_step(self._program)
        self.reset()

    @property
    def chunk_s(self) -> float:
        """Seconds of audio that are computed together: one attention chunk of the encoder."""
        return self._audio.chunk_s

    @property
    def latency_s(self) -> float:
        """The longest time from the end of a frame's audio to the end of the last needed chunk."""
        return self._audio.latency_s

    @property
    def state_bytes(self) -> int:
        """Bytes of the conversation's state on the device. It does not grow."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state))

    @property
    def is_in_turn(self) -> bool:
        """Whether the agent has begun a turn and not ended it, by its text tokens."""
        return self._is_in_turn

    def push(self, samples: ArrayLike) -> Iterator[SttFrame]:
        """Takes the user's next samples [S] and iterates over the frames that they complete.

        The samples are taken at once; a chunk is computed when its first frame is asked for. Raises
        ValueError for samples that are not finite floats of rank 1, and after `finish`.
        """
        self._audio.push(samples)
        return self._computed()

    def finish(self) -> Iterator[SttFrame]:
        """Ends the user's audio and iterates over the last frames, as `offline_inference` has them.

        Raises ValueError after an earlier `finish`.
        """
        self._audio.finish()
        return self._computed()

    def interrupt(self) -> None:
        """Ends the agent's turn, as of the next frame; without a turn it does nothing."""
        self._is_interrupted = self._is_in_turn

    def reset(self) -> None:
        """Starts another conversation with the same options; no program is compiled again."""
        prompt = jnp.asarray([self._options.prompt], jnp.int32).reshape(1, -1)
        self._state = self._start(self._variables, prompt)
        model_hz = self._config.perception.preprocessor.sample_rate
        self._audio = WaitingAudio(self._program.plan, self._options.input_hz, model_hz)
        self._texts = RunningText(self._options.tokenizer), RunningText(self._options.tokenizer)
        self._ready = deque[SttFrame]()
        self._frames, self._is_in_turn, self._is_interrupted = 0, False, False

    def _computed(self) -> Iterator[SttFrame]:
        """The frames of past chunks, which an iteration that was broken off left, and of new."""
        while self._ready or self._audio.has_chunk:
            if not self._ready:
                self._run()
            while self._ready:
                yield self._ready.popleft()

    def _run(self) -> None:
        """Runs one chunk."""
        begun, chunk = time.perf_counter(), self._audio.next_chunk()
        output, self._state = self._step(
            self._variables,
            self._state,
            jnp.asarray(chunk.audio[None]),
            jnp.full(1, chunk.new, jnp.int32),
            jnp.asarray(self._is_interrupted),
        )
        self._is_interrupted = False
        frames: SttSessionFrames = jax.device_get(output)
        compute_s = time.perf_counter() - begun
        for t in np.flatnonzero(frames.is_real[0]).tolist():
            tokens = int(frames.text[0, t]), int(frames.user_text[0, t])
            self._ready.append(self._frame(*tokens, compute_s))

    def _frame(self, text_token: int, user_text_token: int, compute_s: float) -> SttFrame:
        index, ids = self._frames, self._config.text
        frame_s = self._config.perception.token_equivalent_duration
        self._frames += 1
        self._is_in_turn = text_token == ids.bos or (self._is_in_turn and text_token != ids.eos)
        count = self._program.plan.config.frame_count(self._audio.taken)
        is_last = self._audio.is_finished and self._frames == count
        text, user_text = (
            _new_text(running, token, ids, is_last=is_last)
            for running, token in zip(self._texts, (text_token, user_text_token), strict=True)
        )
        return SttFrame(
            index=index,
            text_token=text_token,
            text=text,
            user_text_token=user_text_token,
            user_text=user_text,
            is_in_turn=self._is_in_turn,
            start_s=index * frame_s,
            end_s=(index + 1) * frame_s,
            known_s=self._audio.known_s,
            compute_s=compute_s,
        )


def _new_text(running: RunningText, token: int, ids: TextIds, *, is_last: bool) -> str:
    text = "" if token in (ids.pad, ids.bos, ids.eos) else running.add(token)
    return text + (running.finish() if is_last else "")


def _plan(config: DuplexSttConfig) -> StreamPlan:
    """Steps of one attention chunk of the encoder. Raises ValueError naming the setting."""
    perception = config.perception
    try:
        plan = StreamPlan(config=perception, frames=streaming.natural_frames(perception))
    except ValueError as error:
        raise ValueError(f"this model has no sessions: model.perception.{error}") from error
    problem = caches.endless_problem(config.llm)
    if problem is not None:
        raise ValueError(
            f"this model has no sessions: model.pretrained_llm: {problem}; use an LLM with rotary "
            "positions of fixed frequencies"
        )
    return plan
