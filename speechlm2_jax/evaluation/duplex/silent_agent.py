"""What an agent of pads and silence would score: the figures beside each score."""

from dataclasses import dataclass

import numpy as np

from speechlm2_jax.evaluation.metrics.bleu import BLEU, EmptyTextRate
from speechlm2_jax.evaluation.metrics.error_rates import CER, WER, RightText
from speechlm2_jax.evaluation.metrics.full_duplex import FullDuplex, FullDuplexCounts
from speechlm2_jax.evaluation.metrics.turn_taking import Turns, TurnTaking


@dataclass
class SilentAgent:
    """Scores an agent whose text and speech are empty, in the same conversations."""

    normalizer: str | bool | None = "english"
    has_speech: bool = True
    """Whether the agent's speech is transcribed."""

    def __post_init__(self) -> None:
        normalizer = self.normalizer
        self._texts = [
            BLEU(normalizer=normalizer),
            RightText(normalizer=normalizer),
            EmptyTextRate(),
        ]
        if self.has_speech:
            bleu = BLEU(normalizer=normalizer, key="asr_bleu")
            self._texts += [bleu, WER(normalizer=normalizer), CER(normalizer=normalizer)]
        self._turns, self._events = TurnTaking(), FullDuplex()

    def update(self, name: str, reference: str, user: Turns) -> None:
        """Adds a conversation of set `name`: the agent's text, and when the user has the floor."""
        for metric in self._texts:
            metric.update(name, [reference], [""])
        self._turns.update(name, user, Turns(starts=np.zeros(0), ends=np.zeros(0)))

    def add_events(self, name: str, counts: FullDuplexCounts) -> None:
        """Adds the events of a conversation, as they were counted for the model."""
        self._events.update(name, counts.of_silence())

    def compute(self) -> dict[str, float]:
        """All scores by name, as `DuplexScorer.compute` names them."""
        metrics = (*self._texts, self._turns, self._events)
        return {key: value for metric in metrics for key, value in metric.compute().items()}
