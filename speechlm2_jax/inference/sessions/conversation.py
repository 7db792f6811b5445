"""The host's side of a conversation: samples wait for a chunk, and tokens become frames."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int32, Key

from speechlm2_jax.inference.sessions.duplex_step import SessionFrames
from speechlm2_jax.inference.sessions.waiting_audio import WaitingAudio
from speechlm2_jax.inference.text_stream import RunningText, TextTokenizer
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.perception.streaming import StreamPlan


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


class WaitingChunk(NamedTuple):
    """The input of one conversation for a step, on the host."""

    audio: Float[np.ndarray, " S"]
    """Padded with zeros to a whole chunk."""
    new: int
    """Real samples."""
    is_interrupted: bool


class LiveConversation(WaitingAudio):
    """Samples that wait for the next step, and what is known of the frames so far.

    For each step: `next_input` while `has_chunk`, then `frames` with the step's output.
    """

    def __init__(self, plan: StreamPlan, settings: SessionSettings) -> None:
        super().__init__(plan, settings.input_hz, settings.model_hz)
        self.settings = settings
        self.is_in_turn = False
        """Whether the agent has begun a turn and not ended it, by its text tokens."""
        self._is_interrupted = False
        self._text = RunningText(settings.tokenizer)
        self._frames = 0

    def interrupt(self) -> None:
        """Ends the agent's turn, as of the next frame; without a turn it does nothing."""
        self._is_interrupted = self.is_in_turn

    def next_input(self) -> WaitingChunk:
        """Takes the samples of the next step, and whether the agent is interrupted."""
        chunk = WaitingChunk(*self.next_chunk(), self._is_interrupted)
        self._is_interrupted = False
        return chunk

    def frames(self, output: SessionFrames, slot: int, compute_s: float) -> list[DuplexFrame]:
        """The real frames of a step's output, which is on the host; this is its row `slot`."""
        real = np.flatnonzero(output.is_real[slot]).tolist()
        return [self._frame(output, (slot, t), compute_s) for t in real]

    def _check_length(self, samples: int) -> None:
        limit = self.settings.max_frames
        if limit is not None and self.plan.config.frame_count(samples) > limit:
            raise ValueError(
                f"the conversation has more than the {limit} frames for which the speech decoder "
                "has learnt positions (model.speech_decoder.max_length_causal_mask); call reset()"
            )

    def _frame(self, output: SessionFrames, at: tuple[int, int], compute_s: float) -> DuplexFrame:
        index, token, ids = self._frames, int(output.text[at]), self.settings.text
        self._frames += 1
        self.is_in_turn = token == ids.bos or (self.is_in_turn and token != ids.eos)
        is_control = token in (ids.pad, ids.bos, ids.eos)
        is_last = self.is_finished and self._frames == self.plan.config.frame_count(self.taken)
        text = "" if is_control else self._text.add(token)
        frame_s = self.settings.frame_s
        return DuplexFrame(
            index=index,
            text_token=token,
            text=text + (self._text.finish() if is_last else ""),
            codes=np.asarray(output.codes[at]),
            audio=np.asarray(output.audio[at]),
            is_in_turn=self.is_in_turn,
            start_s=index * frame_s,
            end_s=(index + 1) * frame_s,
            known_s=self.known_s,
            compute_s=compute_s,
        )
