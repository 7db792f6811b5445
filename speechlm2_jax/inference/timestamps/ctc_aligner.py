"""Aligns words with recordings by the CTC head of an ASR model, in few static shapes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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

    @property
    def frame_s(self) -> float:
        """Duration of a frame in seconds."""
        return self.frame_samples / self.sampling_rate

    def align(
        self, waves: Sequence[np.ndarray], words: Sequence[Sequence[str]]
    ) -> list[AlignedLabels]:
        """Aligns the words of each recording (float32 [S] at `sampling_rate`).

        Recordings of similar length share a batch of at most `batch_size`.
        """
        encoded = [self.encoder(own) for own in words]
        order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
        found: dict[int, AlignedLabels] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self._run([waves[i] for i in chosen], [encoded[i] for i in chosen])
            found |= dict(zip(chosen, batch, strict=True))
        return [found[i] for i in range(len(waves))]

    def _run(
        self, waves: Sequence[np.ndarray], texts: Sequence[Sequence[WordLabels]]
    ) -> list[AlignedLabels]:
        pad = SILENT_FRAMES * self.frame_samples
        ids = [_joined(words, self.encoder.space) for words in texts]
        rows = round_up(len(waves), 1)
        samples = round_up(max(map(len, waves)) + 2 * pad, SAMPLE_UNIT)
        audio, lengths = pad_right([np.pad(w, pad) for w in waves], rows=rows, width=samples)
        width = round_up(max(map(len, ids)), LABEL_UNIT)
        labels, counts = pad_right(ids, rows=rows, width=width, dtype=np.int32)
        log_probs, frames = ctc_log_probs(
            self.graphdef,
            self.variables,
            jnp.asarray(audio),
            jnp.asarray(lengths),
            self.precision,
        )
        aligned = _align(log_probs, frames, jnp.asarray(labels), jnp.asarray(counts))
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


_align = jax.jit(align_labels)


def _joined(words: Sequence[WordLabels], space: int | None) -> list[int]:
    """The labels of a text, with the space between words if it is a label."""
    joined: list[int] = []
    for word in words:
        if word.labels and joined and space is not None:
            joined.append(space)
        joined += word.labels
    return joined
