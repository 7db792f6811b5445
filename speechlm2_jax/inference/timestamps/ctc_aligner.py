"""Aligns words with recordings by the CTC head of an ASR model, in few static shapes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.asr.ctc import CtcNetwork
from speechlm2_jax.asr.ctc_alignment import LabelFrames, align_labels
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.inference.padding import SAMPLE_UNIT, round_up
from speechlm2_jax.inference.timestamps.aligner import AlignedLabels
from speechlm2_jax.inference.timestamps.bounds import CTC_TIMING, TimedLabel, Timing
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.pretrained.label_encoder import LabelEncoder, WordLabels

LABEL_UNIT = 16
"""Texts are padded to 16, 24, 32, 48, ... labels."""
SILENT_FRAMES = 3
"""Frames of silence put around a recording: words at its edges, and many labels, need room."""
DEFAULT_BATCH_SIZE = 16
WHOLE_S = 60.0
"""Longer recordings are encoded in windows, as attention over all of their frames takes too much
memory; they are aligned as a whole."""
WINDOW_S, OVERLAP_S = 40.0, 4.0
"""Two windows share OVERLAP_S. Each gives the frames up to its middle."""
FRAME_UNIT = 512
"""Frames of long recordings are padded to 512, 768, 1024, ..."""


@dataclass(frozen=True, kw_only=True)
class CtcAligner:
    """An ASR model with a CTC head that aligns known texts."""

    graphdef: nnx.GraphDef[Any]
    """Of a `CtcNetwork`."""
    variables: Variables
    encoder: LabelEncoder
    sampling_rate: int
    """Samples per second of the input."""
    frame_samples: int
    """Samples behind one frame."""
    precision: str | None = None
    """Of matmuls; None is the default of the platform."""
    batch_size: int = DEFAULT_BATCH_SIZE
    timing: Timing = CTC_TIMING
    sizes: tuple[int, ...] = ()
    """Samples that recordings are padded to, in ascending order; longer ones are rounded up."""

    @property
    def frame_s(self) -> float:
        """Duration of a frame in seconds."""
        return self.frame_samples / self.sampling_rate

    def in_sizes(self, samples: Sequence[int]) -> "CtcAligner":
        """The aligner with one program for each size; recordings of `samples` fill one."""
        pad = 2 * SILENT_FRAMES * self.frame_samples
        return replace(self, sizes=tuple(count + pad for count in sorted(samples)))

    def align(
        self, waves: Sequence[np.ndarray], words: Sequence[Sequence[str]]
    ) -> list[AlignedLabels]:
        """Aligns the words of each recording (float32 [S] at `sampling_rate`).

        Recordings of similar length share a batch of at most `batch_size`.
        """
        encoded = [self.encoder(own) for own in words]
        whole = int(WHOLE_S * self.sampling_rate)
        order = sorted(
            (i for i in range(len(waves)) if len(waves[i]) <= whole), key=lambda i: len(waves[i])
        )
        found = {
            i: self._run_long(waves[i], encoded[i])
            for i in range(len(waves))
            if len(waves[i]) > whole
        }
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self._run([waves[i] for i in chosen], [encoded[i] for i in chosen])
            found |= dict(zip(chosen, batch, strict=True))
        return [found[i] for i in range(len(waves))]

    def _run(
        self, waves: Sequence[np.ndarray], texts: Sequence[Sequence[WordLabels]]
    ) -> list[AlignedLabels]:
        pad = SILENT_FRAMES * self.frame_samples
        rows = round_up(len(waves), 1)
        longest = max(map(len, waves)) + 2 * pad
        own = (size for size in self.sizes if longest <= size)
        samples = next(own, round_up(longest, SAMPLE_UNIT))
        audio, lengths = pad_right([np.pad(w, pad) for w in waves], rows=rows, width=samples)
        return self._align(*self._log_probs(audio, lengths), texts)

    def _run_long(self, wave: np.ndarray, words: Sequence[WordLabels]) -> AlignedLabels:
        """Aligns a long recording, encoded in windows that overlap."""
        frame = self.frame_samples
        window, shared = (int(s * self.sampling_rate) // frame for s in (WINDOW_S, OVERLAP_S))
        padded = np.pad(wave, SILENT_FRAMES * frame)
        starts = range(0, max(len(padded) // frame - shared, 1), window - shared)
        parts: list[np.ndarray] = []
        for first in range(0, len(starts), self.batch_size):
            chosen = starts[first : first + self.batch_size]
            clips = [padded[s * frame : (s + window) * frame] for s in chosen]
            rows = round_up(len(clips), 1)
            found = jax.device_get(
                self._log_probs(*pad_right(clips, rows=rows, width=window * frame))
            )
            for start, log_probs, count in zip(chosen, *found, strict=False):
                begin = shared // 2 if start else 0
                end = int(count) if start == starts[-1] else window - (shared - shared // 2)
                parts.append(log_probs[begin:end])
        joined = np.concatenate(parts)
        frames = np.array([len(joined)], np.int32)
        room = round_up(len(joined), FRAME_UNIT) - len(joined)
        log_probs = jnp.asarray(np.pad(joined, ((0, room), (0, 0)))[None])
        return self._align(log_probs, jnp.asarray(frames), [words])[0]

    def _log_probs(self, audio: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities [B, T, C] and frames [B] of a batch."""
        inputs = jnp.asarray(audio), jnp.asarray(lengths)
        return ctc_log_probs(self.graphdef, self.variables, *inputs, self.precision)

    def _align(
        self, log_probs: jax.Array, frames: jax.Array, texts: Sequence[Sequence[WordLabels]]
    ) -> list[AlignedLabels]:
        """Aligns the texts of a batch; further rows are padding."""
        ids = [_joined(words, self.encoder.space) for words in texts]
        longest = max(map(len, ids))
        # more labels than frames fit into no recording
        has_size = bool(self.sizes) and longest <= log_probs.shape[1]
        width = log_probs.shape[1] if has_size else round_up(longest, LABEL_UNIT)
        labels, counts = pad_right(ids, rows=len(log_probs), width=width, dtype=np.int32)
        aligned = align_batch(log_probs, frames, jnp.asarray(labels), jnp.asarray(counts))
        aligned, frame_counts = jax.device_get((aligned, frames))
        by_row = [LabelFrames(*(field[n] for field in aligned)) for n in range(len(texts))]
        return [
            self._read(own, words, int(count))
            for own, words, count in zip(by_row, texts, frame_counts, strict=False)
        ]

    def _read(
        self, aligned: LabelFrames, words: Sequence[WordLabels], frames: int
    ) -> AlignedLabels:
        """The labels in seconds from the start of the recording, before the silence around it."""
        fits, place = bool(aligned.fits), 0
        labels: list[TimedLabel] = []
        log_probs: list[float | None] = []
        for number, word in enumerate(words):
            if not word.labels or not fits:
                labels.append(TimedLabel(number, word.length, None))
                log_probs.append(None)
                continue
            if place and self.encoder.space is not None:
                place += 1
            for i, letters in enumerate(word.letters, start=place):
                start, end = int(aligned.first[i]), int(aligned.end[i])
                own = [(frame - SILENT_FRAMES) * self.frame_s for frame in (start, end)]
                labels.append(TimedLabel(number, letters, (own[0], own[1])))
                log_probs.append(float(aligned.log_probs[i]))
            place += len(word.labels)
        if fits:
            score = float(aligned.path_log_probs) / max(frames, 1)
            return AlignedLabels(tuple(labels), tuple(log_probs), score)
        count = sum(len(word.labels) for word in words)
        problem = f"its text has {count} labels, too many for {frames} frames"
        return AlignedLabels(tuple(labels), tuple(log_probs), None, problem)


@partial(jax.jit, static_argnames=("graphdef", "precision"))
def ctc_log_probs(
    graphdef: nnx.GraphDef[CtcNetwork],
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    precision: str | None = None,
) -> tuple[Float[Array, "B T C"], Int[Array, " B"]]:
    """The log-probabilities of CTC's labels and blank (the last class), and the frames of each."""
    with nullcontext() if precision is None else jax.default_matmul_precision(precision):
        network: CtcNetwork = merge(graphdef, variables)
        output = network(audio, lengths, dtype=jnp.dtype(network.ctc.compute_dtype))
        return jax.nn.log_softmax(network.logits(output.frames)), output.lengths


align_batch = jax.jit(align_labels)


def _joined(words: Sequence[WordLabels], space: int | None) -> list[int]:
    """The labels of a text, with the space between words if it is a label."""
    joined: list[int] = []
    for word in words:
        if word.labels and joined and space is not None:
            joined.append(space)
        joined += word.labels
    return joined
