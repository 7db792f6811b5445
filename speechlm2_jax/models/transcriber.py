"""`Transcriber`, the base of the ASR models: recordings in, texts out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.asr.ctc import CtcNetwork, best_path
from speechlm2_jax.inference import stages
from speechlm2_jax.inference.audio_inputs import Recordings
from speechlm2_jax.inference.recordings_to_text import (
    ClipFunctions,
    ClipText,
    check_timestamps,
    transcribe_recordings,
    words_by,
)
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.inference.transcribe import (
    DEFAULT_BATCH_SIZE,
    check_options,
    read_recordings,
    transcribe,
)
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.models.finding_aligners import find_aligner
from speechlm2_jax.pretrained.asr_labels import LabelDecoder


class Transcriber(ABC):
    """A trained ASR model: `transcribe` turns audio into text."""

    SHORTEST_S: ClassVar[float] = 0.0
    """Shorter recordings are padded with silence on both sides."""

    _variables: Variables | None
    """Weights and buffers by path; None if there are none yet."""
    _to_text: LabelDecoder

    @property
    @abstractmethod
    def sampling_rate(self) -> int:
        """Sampling rate of the input audio in Hz."""

    @abstractmethod
    def aligner(self) -> Aligner:
        """The model as what finds the times of words."""

    @abstractmethod
    def _decode(self, audio: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        """The labels of each recording of a batch [B, S] of `lengths` [B]."""

    @property
    def device(self) -> jax.Device:
        """The device that the model runs on, the first of several. Inputs may be on any."""
        return stages.device_of(self._variables)

    def transcribe(
        self,
        audio: Recordings,
        lengths: ArrayLike | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        channel_selector: int | str | None = None,
        timestamps: str | bool | None = None,
        max_audio_s: float | None = None,
        aligner: Aligner | str | None = None,
        **options: Any,
    ) -> list[Transcript]:
        """Transcribes recordings, in input order; each text is a str.

        - `audio`: a path, an array [S] at `sampling_rate`, `(rate, array)` or a dict of datasets, a
          list of these, or a float batch [B, S].
        - `lengths` [B]: samples of each recording of a batch, S by default; length 0 gives "".
        - `channel_selector`: the channel of files with several; "average" mixes them.
        - `timestamps`: with "segment" a text also has `segments` with times in seconds, with "word"
          their `words` too. `aligner` finds them: an ASR model's name or path, or `aligner()` by
          default.
        - `max_audio_s`: longer recordings are cut at pauses, and parts without speech have no text.
        - `options`: NeMo's arguments without effect here (verbose, num_workers, use_lhotse).

        The texts do not depend on order, padding and other recordings of the batch. Raises
        AudioError for an unusable recording, ValueError for any other value or a length above S.
        """
        check_options(options)
        shortest = int(self.SHORTEST_S * self.sampling_rate)
        waves = read_recordings(audio, lengths, self.sampling_rate, channel_selector)

        def to_texts(clips: Sequence[np.ndarray]) -> list[ClipText]:
            padded = [_centred(clip, shortest) if len(clip) else clip for clip in clips]
            texts = transcribe(padded, self._decode, self._to_text, batch_size)
            return [ClipText(text) for text in texts]

        return transcribe_recordings(
            waves,
            ClipFunctions(
                rate_hz=self.sampling_rate,
                to_texts=to_texts,
                to_words=words_by(lambda: find_aligner(aligner, self.aligner), self.sampling_rate),
            ),
            timestamps=check_timestamps(timestamps),
            max_audio_s=max_audio_s,
            has_guards=max_audio_s is not None,
        )


@partial(jax.jit, static_argnames=("graphdef", "precision"))
def best_paths(
    graphdef: nnx.GraphDef[CtcNetwork],
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    precision: str | None = None,
) -> Int[Array, "B T"]:
    """The most likely CTC label of every frame; blank beyond the audio.

    `precision` is that of matmuls; None is the default of the platform, or of the caller.
    """
    with nullcontext() if precision is None else jax.default_matmul_precision(precision):
        network: CtcNetwork = merge(graphdef, variables)
        output = network(audio, lengths, dtype=jnp.dtype(network.ctc.compute_dtype))
        return best_path(network.logits(output.frames), output.lengths)


def _centred(wave: np.ndarray, shortest: int) -> np.ndarray:
    """The recording with silence on both sides, the odd sample after it, to `shortest` samples."""
    missing = max(shortest - len(wave), 0)
    return np.pad(wave, (missing // 2, missing - missing // 2))
