"""How many tokens a duplex model gets right while it speaks freely, and what silence would get."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from speechlm2_jax.evaluation.metrics.text_metric import by_set


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Right tokens and all that were due; sums of it are counts over all of them."""

    text: int = 0
    text_right: int = 0
    codes: int = 0
    codes_right: int = 0
    codes_silent: int = 0
    """Codes that an agent which is silent throughout would have right."""

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            text=self.text + other.text,
            text_right=self.text_right + other.text_right,
            codes=self.codes + other.codes,
            codes_right=self.codes_right + other.codes_right,
            codes_silent=self.codes_silent + other.codes_silent,
        )

    def scores(self) -> dict[str, float]:
        """Shares by name; one that has nothing to divide by is left out."""
        rates = {
            "txt_token_acc": (self.text_right, self.text),
            "audio_token_acc": (self.codes_right, self.codes),
            "audio_token_acc_of_silence": (self.codes_silent, self.codes),
        }
        return {key: right / due for key, (right, due) in rates.items() if due}


def count_tokens(
    text: Any, codes: Any, said_text: Any, said_codes: Any, *, pad_id: int, bos: int, eos: int
) -> TokenCounts:
    """Compares what was due in each frame with what was said.

    Args:
        text: int [T], the agent's channel as in training; compared where no pad is due.
        codes: int [T, K]; compared from the frame of `bos` to that of `eos`, all codebooks alike.
        said_text: int [T].
        said_codes: int [T, K].
        pad_id: of the text channel.
        bos: the code that starts an utterance.
        eos: the code that ends it.
    """
    text, codes, said_text, said_codes = map(np.asarray, (text, codes, said_text, said_codes))
    is_text = text != pad_id
    is_speech = _is_speech(codes[:, 0], bos, eos)
    silence = codes[min(1, len(codes) - 1)] if len(codes) else codes
    return TokenCounts(
        text=int(is_text.sum()),
        text_right=int((text == said_text)[is_text].sum()),
        codes=int(is_speech.sum()) * codes.shape[1],
        codes_right=int((codes == said_codes)[is_speech].sum()),
        codes_silent=int((codes == silence)[is_speech].sum()),
    )


def _is_speech(codes: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """Frames from each `bos` to the next `eos`, both included."""
    frame = np.arange(len(codes))
    begun = np.maximum.accumulate(np.where(codes == bos, frame, -1))
    ended = np.maximum.accumulate(np.where(codes == eos, frame, -1))
    return (begun >= 0) & ((begun >= ended) | (codes == eos) & (np.roll(ended, 1) < begun))


class TokenAccuracy:
    """Shares of right tokens: `KEY_SET` per data set and `KEY`, their mean.

    Keys: `txt_token_acc`, `audio_token_acc` and `audio_token_acc_of_silence`.
    """

    def __init__(self) -> None:
        self._counts: dict[str, TokenCounts] = {}

    def update(self, name: str, counts: TokenCounts) -> None:
        """Adds what was counted in data set `name`."""
        self._counts[name] = self._counts.get(name, TokenCounts()) + counts

    def compute(self) -> dict[str, float]:
        """All scores by name; empty if nothing was added."""
        sets = {name: counts.scores() for name, counts in self._counts.items()}
        keys = dict.fromkeys(key for scores in sets.values() for key in scores)
        named: dict[str, float] = {}
        for key in keys:
            named |= by_set(key, {n: s[key] for n, s in sets.items() if key in s})
        return named
