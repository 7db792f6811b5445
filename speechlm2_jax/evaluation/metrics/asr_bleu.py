"""What generated speech says: a recogniser writes it down, and its text is scored."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechlm2_jax.data.audio import sinc_resample
from speechlm2_jax.evaluation.metrics.bleu import BLEU
from speechlm2_jax.evaluation.metrics.error_rates import CER, WER
from speechlm2_jax.evaluation.metrics.text_metric import AnyNormalizer


@runtime_checkable
class Transcriber(Protocol):
    """What writes speech down; `speechlm2_jax.models.ASRModel` is one."""

    @property
    def sampling_rate(self) -> int:
        """Samples per second that it hears."""
        ...

    def transcribe(self, audio: Any, lengths: Any) -> Sequence[str]:
        """The text of each row of float32 [B, S] with `lengths` [B] samples."""
        ...


class ASRBLEU:
    """BLEU, word and character error rate of generated speech, per data set.

    Keys: `asr_bleu_SET` and `asr_bleu` (0 to 100), and the same of `wer` and `cer`.
    """

    def __init__(
        self,
        recogniser: Transcriber,
        normalize: bool = True,
        normalizer: AnyNormalizer = "english",
        verbose: bool = False,
    ) -> None:
        self._recogniser: Transcriber | None = recogniser
        self._metrics = (
            BLEU(normalize, normalizer, verbose, key="asr_bleu"),
            WER(normalize, normalizer),
            CER(normalize, normalizer),
        )

    def update(
        self,
        name: str,
        references: Sequence[str],
        audio: Any,
        lengths: Any = None,
        *,
        sample_rate_hz: int,
    ) -> list[str]:
        """Scores speech float [B, S] of `lengths` [B] samples against what it should say.

        Returns what was heard. Raises ValueError if rows and references do not pair up.
        """
        rows = np.asarray(audio, np.float32)
        counts = np.full(len(rows), rows.shape[1]) if lengths is None else np.asarray(lengths, int)
        if not len(references) == len(rows) == len(counts):
            raise ValueError(
                f"{len(references)} references, {len(rows)} rows of audio and {len(counts)} "
                f"lengths of {name!r}; give one of each per utterance"
            )
        heard = self._transcribe(rows, counts, sample_rate_hz)
        self.update_texts(name, references, heard)
        return heard

    def update_texts(self, name: str, references: Sequence[str], heard: Sequence[str]) -> None:
        """Adds what was transcribed before, by an earlier process for instance."""
        for metric in self._metrics:
            metric.update(name, references, heard)

    def release(self) -> None:
        """Lets go of the recogniser; nothing can be added any more."""
        self._recogniser = None

    def merge(self, other: "ASRBLEU") -> None:
        """Adds what another one has collected."""
        for metric, more in zip(self._metrics, other._metrics, strict=True):
            metric.merge(more)

    def compute(self) -> dict[str, float]:
        """All scores by name; empty if nothing was added."""
        return {key: value for metric in self._metrics for key, value in metric.compute().items()}

    def _transcribe(self, rows: np.ndarray, counts: np.ndarray, rate_hz: int) -> list[str]:
        """Brings each row to the recogniser's rate, without what lies beyond its length."""
        if self._recogniser is None:
            raise RuntimeError("the recogniser has been released")
        to_hz = self._recogniser.sampling_rate
        waves = [
            sinc_resample(row[:count], rate_hz, to_hz)[: count * to_hz // rate_hz]
            for row, count in zip(rows, counts, strict=True)
        ]
        audio = np.zeros((len(waves), max(map(len, waves), default=0)), np.float32)
        for row, wave in zip(audio, waves, strict=True):
            row[: len(wave)] = wave
        return [*self._recogniser.transcribe(audio, np.array([len(wave) for wave in waves], int))]
