"""Live transcription: samples of any number in, final and partial text out."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.asr.ctc import CtcNetwork
from speechlm2_jax.inference.sessions.waiting_audio import WaitingAudio
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.perception.streaming import (
    StreamPlan,
    StreamState,
    advance,
    natural_frames,
    start_stream,
)

PRECISION = "highest"
"""Of matmuls, as in offline transcription: texts must not depend on the device."""
Join = Callable[[list[int]], str]
"""Labels without blanks -> their text."""


@dataclass(frozen=True, kw_only=True)
class TranscriptUpdate:
    """What one chunk of audio adds to the transcript."""

    text: str
    """New whole words, which no later audio changes; those of all updates are the transcript."""
    partial: str
    """The beginning of the next word, which later audio may continue."""
    known_s: float
    """Seconds of audio after which the chunk was computed."""
    compute_s: float
    """Time that it took to compute."""


class GrowingTranscript:
    """Best CTC labels of frame after frame become words."""

    def __init__(self, to_text: Join, blank: int) -> None:
        self._to_text, self._blank = to_text, blank
        self._last = blank
        self._open: list[int] = []

    @property
    def partial(self) -> str:
        """The text of the labels whose word has not ended."""
        return self._to_text(self._open).strip()

    def add(self, label: int) -> str:
        """Takes the best class of the next frame; returns the words that are whole now."""
        is_new, self._last = label not in (self._last, self._blank), label
        if not is_new:
            return ""
        before, after = self.partial, self._to_text([*self._open, label]).lstrip()
        if before and after.startswith(f"{before} "):
            self._open = [label]
            return before
        self._open.append(label)
        return ""

    def finish(self) -> str:
        """Ends the last word and returns it."""
        last, self._open = self.partial, []
        return last


class TranscriptionSession:
    """One recording that is transcribed while it goes on. `model.session()` makes it.

    ```python
    session = model.session(sampling_rate=48_000)
    for update in session.push(samples):   # any number of samples [S] within [-1, 1]
        print(update.text, update.partial)
    ```

    The words of all pushes and of `finish` are those of the greedy offline transcript of the same
    audio, which may have more than one space between two of them.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[CtcNetwork],
        variables: Variables,
        config: PerceptionConfig,
        to_text: Join,
        blank: int,
        input_hz: int,
        context: tuple[int, int] | None = None,
    ) -> None:
        try:
            frames = natural_frames(config, context)
            self._plan = StreamPlan(config=config, frames=frames, context=context)
        except ValueError as error:
            raise ValueError(
                f"this model has no sessions: {error}; transcribe() takes whole recordings"
            ) from error
        self._variables, self._to_text, self._blank = variables, to_text, blank
        self._rates = input_hz, config.preprocessor.sample_rate
        self._step = _make_step(graphdef, self._plan)
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
        """Bytes of the state on the device. It does not grow."""
        return sum(x.nbytes for x in jax.tree.leaves(self._state))

    def push(self, samples: ArrayLike) -> Iterator[TranscriptUpdate]:
        """Takes the next samples [S] and iterates over the chunks that they complete.

        The samples are taken at once; a chunk is computed when it is asked for. Raises ValueError
        for samples that are not finite floats of rank 1, and after `finish`.
        """
        self._audio.push(samples)
        return self._computed()

    def finish(self) -> Iterator[TranscriptUpdate]:
        """Ends the audio and iterates over the last chunks; the last update ends the last word.

        Raises ValueError after an earlier `finish`.
        """
        self._audio.finish()
        return self._computed(is_last=True)

    def reset(self) -> None:
        """Starts another recording with the same options; no program is compiled again."""
        self._audio = WaitingAudio(self._plan, *self._rates)
        self._state = start_stream(self._plan, 1)
        self._transcript = GrowingTranscript(self._to_text, self._blank)

    def _computed(self, is_last: bool = False) -> Iterator[TranscriptUpdate]:
        while self._audio.has_chunk:
            begun = time.perf_counter()
            words = self._run()
            if is_last and not self._audio.has_chunk:
                words.append(self._transcript.finish())
            yield TranscriptUpdate(
                text=" ".join(filter(None, words)),
                partial=self._transcript.partial,
                known_s=self._audio.known_s,
                compute_s=time.perf_counter() - begun,
            )

    def _run(self) -> list[str]:
        """Runs one chunk; gives the words that it ends."""
        chunk = self._audio.next_chunk()
        new = jnp.full(1, chunk.new, jnp.int32)
        output, self._state = self._step(
            self._variables, self._state, jnp.asarray(chunk.audio[None]), new
        )
        labels, is_real = jax.device_get(output)
        return [self._transcript.add(int(label)) for label in labels[0][is_real[0]]]


def _make_step(
    graphdef: nnx.GraphDef[CtcNetwork], plan: StreamPlan
) -> Callable[..., tuple[tuple[Array, Array], StreamState]]:
    """Compiles `step(variables, stream, audio, new)`, which donates `stream`.

    Its output is the best class of each frame [B, F] and which frames are real [B, F].
    """

    def step(
        variables: Variables,
        stream: StreamState,
        audio: Float[Array, "B S"],
        new: Int[Array, " B"],
    ) -> tuple[tuple[Int[Array, "B F"], Bool[Array, "B F"]], StreamState]:
        with jax.default_matmul_precision(PRECISION):
            network: CtcNetwork = merge(graphdef, variables)
            output, stream = advance(network, plan, stream, audio, new)
            labels = jnp.argmax(network.logits(output.frames), axis=-1)
        return (labels, output.is_real), stream

    return jax.jit(step, donate_argnums=1)
