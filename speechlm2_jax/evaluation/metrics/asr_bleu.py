"""ASR-BLEU: an ASR model transcribes generated speech, and the transcript is scored."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.data.audio import sinc_resample
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.evaluation.metrics.bleu import BLEU
from speechlm2_jax.evaluation.metrics.error_rates import CER, WER
from speechlm2_jax.evaluation.metrics.text_metric import AnyNormalizer


@runtime_checkable
class ScoringASRModel(Protocol):
    """A model that transcribes speech; `speechlm2_jax.models.ASRModel` is one."""

    @property
    def sampling_rate(self) -> int:
        """Input sampling rate in Hz."""
        ...

    def transcribe(self, audio: ArrayLike, lengths: ArrayLike | None) -> Sequence[str]:
        """The text of each recording of float32 [B, S], of `lengths` [B] samples."""
        ...


class ASRBLEU:
    """BLEU, word and character error rate of generated speech, per data set.

    Keys: `asr_bleu_SET` and `asr_bleu` (0 to 100), and the same of `wer` and `cer`.
    """

    def __init__(
        self,
        asr_model: ScoringASRModel,
        normalize: bool = True,
        normalizer: AnyNormalizer = "english",
        verbose: bool = False,
    ) -> None:
        self._asr_model: ScoringASRModel | None = asr_model
        self._metrics = (
            BLEU(normalize, normalizer, verbose, key="asr_bleu"),
            WER(normalize, normalizer),
            CER(normalize, normalizer),
        )

    def update(
        self,
        name: str,
        references: Sequence[str],
        audio: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        sample_rate_hz: int,
    ) -> list[str]:
        """Scores speech [B, S] of `lengths` [B] samples against its references.

        Returns the transcripts. Raises ValueError if the numbers of recordings, references and
        lengths differ.
        """
        padded = np.asarray(audio, np.float32)
        counts = (
            np.full(len(padded), padded.shape[1]) if lengths is None else np.asarray(lengths, int)
        )
        if not len(references) == len(padded) == len(counts):
            raise ValueError(
                f"{name!r}: {len(references)} references, {len(padded)} recordings and "
                f"{len(counts)} lengths; pass one of each per utterance"
            )
        texts = self._transcribe(padded, counts, sample_rate_hz)
        self.update_texts(name, references, texts)
        return texts

    def update_texts(self, name: str, references: Sequence[str], texts: Sequence[str]) -> None:
        """Adds existing transcripts, such as those of an interrupted evaluation."""
        for metric in self._metrics:
            metric.update(name, references, texts)

    def release(self) -> None:
        """Frees the ASR model; `update` raises RuntimeError from now on."""
        self._asr_model = None

    def merge(self, other: "ASRBLEU") -> None:
        """Adds the pairs of another one."""
        for metric, more in zip(self._metrics, other._metrics, strict=True):
            metric.merge(more)

    def compute(self) -> dict[str, float]:
        """All scores by name; empty if nothing was added."""
        return {key: value for metric in self._metrics for key, value in metric.compute().items()}

    def _transcribe(
        self, padded: Float[np.ndarray, "B S"], counts: Int[np.ndarray, " B"], rate_hz: int
    ) -> list[str]:
        """Removes padding, resamples to the ASR model's rate, transcribes."""
        if self._asr_model is None:
            raise RuntimeError("the ASR model was released; make a new ASRBLEU")
        to_hz = self._asr_model.sampling_rate
        waves = [
            sinc_resample(wave[:count], rate_hz, to_hz)[: count * to_hz // rate_hz]
            for wave, count in zip(padded, counts, strict=True)
        ]
        return [*self._asr_model.transcribe(*pad_right(waves))]
