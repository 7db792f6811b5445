"""Token accuracy of a duplex model in free-running generation, and that of constant silence."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.evaluation.metrics.text_metric import by_set


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Numbers of target tokens and of correct ones; can be summed over conversations."""

    text: int = 0
    text_right: int = 0
    codes: int = 0
    codes_right: int = 0
    codes_silent: int = 0
    """Codes that an always silent agent would have correct."""

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            text=self.text + other.text,
            text_right=self.text_right + other.text_right,
            codes=self.codes + other.codes,
            codes_right=self.codes_right + other.codes_right,
            codes_silent=self.codes_silent + other.codes_silent,
        )

    def scores(self) -> dict[str, float]:
        """Accuracies by name; one without target tokens is left out."""
        rates = {
            "txt_token_acc": (self.text_right, self.text),
            "audio_token_acc": (self.codes_right, self.codes),
            "audio_token_acc_of_silence": (self.codes_silent, self.codes),
        }
        return {key: right / total for key, (right, total) in rates.items() if total}


def count_tokens(
    target_text: ArrayLike,
    target_codes: ArrayLike,
    text: ArrayLike,
    codes: ArrayLike,
    *,
    pad_id: int,
    bos: int,
    eos: int,
) -> TokenCounts:
    """Compares target and generated tokens frame by frame.

    Args:
        target_text: int [T], the agent's text channel as in training; compared where it is no pad.
        target_codes: int [T, K]; compared from the frame of `bos` to that of `eos`.
        text: int [T], generated.
        codes: int [T, K], generated.
        pad_id: pad token of the text channel.
        bos: the code that starts a turn.
        eos: the code that ends a turn.
    """
    target_text, target_codes = np.asarray(target_text), np.asarray(target_codes)
    is_text = target_text != pad_id
    is_speech = _is_speech(target_codes[:, 0], bos, eos)
    # an always silent agent repeats the codes of frame 1
    silence = target_codes[min(1, len(target_codes) - 1)] if len(target_codes) else target_codes
    return TokenCounts(
        text=int(is_text.sum()),
        text_right=int((target_text == np.asarray(text))[is_text].sum()),
        codes=int(is_speech.sum()) * target_codes.shape[1],
        codes_right=int((target_codes == np.asarray(codes))[is_speech].sum()),
        codes_silent=int((target_codes == silence)[is_speech].sum()),
    )


def _is_speech(codes: Int[np.ndarray, " T"], bos: int, eos: int) -> Bool[np.ndarray, " T"]:
    """Frames from each `bos` to the next `eos`, both included."""
    frame = np.arange(len(codes))
    last_bos = np.maximum.accumulate(np.where(codes == bos, frame, -1))
    last_eos = np.maximum.accumulate(np.where(codes == eos, frame, -1))
    is_end = (codes == eos) & (np.roll(last_eos, 1) < last_bos)
    return (last_bos >= 0) & ((last_bos >= last_eos) | is_end)


class TokenAccuracy:
    """Shares of correct tokens: `KEY_SET` per data set and `KEY`, their mean.

    Keys: `txt_token_acc`, `audio_token_acc` and `audio_token_acc_of_silence`.
    """

    def __init__(self) -> None:
        self._counts: dict[str, TokenCounts] = {}

    def update(self, name: str, counts: TokenCounts) -> None:
        """Adds counts of data set `name`."""
        self._counts[name] = self._counts.get(name, TokenCounts()) + counts

    def compute(self) -> dict[str, float]:
        """All scores by name; empty if nothing was added."""
        sets = {name: counts.scores() for name, counts in self._counts.items()}
        keys = dict.fromkeys(key for scores in sets.values() for key in scores)
        named: dict[str, float] = {}
        for key in keys:
            named |= by_set(key, {n: s[key] for n, s in sets.items() if key in s})
        return named
