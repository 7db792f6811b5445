"""Word and character error rates, and the share of right texts, per data set."""

import math
from collections.abc import Sequence

from speechlm2_jax.evaluation.metrics.text_metric import AnyNormalizer, TextMetric
from speechlm2_jax.evaluation.metrics.wer import word_errors


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word edits per reference word; infinite without reference words, as in NeMo."""
    rate = word_errors(references, hypotheses).wer
    return math.inf if rate is None else rate


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character edits per reference character, spaces included; infinite without characters."""
    import jiwer

    characters = sum(map(len, references))
    if not characters:
        return math.inf
    # jiwer's own transform would strip outer spaces
    split = jiwer.Compose([jiwer.ReduceToListOfListOfChars()])
    found = jiwer.process_characters(list(references), list(hypotheses), split, split)
    return (found.insertions + found.deletions + found.substitutions) / characters


def right_share(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """The share of hypotheses that equal their reference."""
    pairs = zip(references, hypotheses, strict=True)
    return sum(reference == text for reference, text in pairs) / len(references)


class WER(TextMetric):
    """`wer_SET` and `wer`: word error rate, 0 if all words are correct."""

    def __init__(
        self,
        normalize: bool = True,
        normalizer: AnyNormalizer = "english",
        verbose: bool = False,
        *,
        key: str = "wer",
    ) -> None:
        super().__init__(
            key, word_error_rate, normalize=normalize, normalizer=normalizer, verbose=verbose
        )


class CER(TextMetric):
    """`cer_SET` and `cer`: character error rate, 0 if all characters are correct."""

    def __init__(
        self,
        normalize: bool = True,
        normalizer: AnyNormalizer = "english",
        verbose: bool = False,
        *,
        key: str = "cer",
    ) -> None:
        super().__init__(
            key, character_error_rate, normalize=normalize, normalizer=normalizer, verbose=verbose
        )


class RightText(TextMetric):
    """`right_text_SET` and `right_text`: the share of texts without an error."""

    def __init__(
        self,
        normalize: bool = True,
        normalizer: AnyNormalizer = "english",
        verbose: bool = False,
        *,
        key: str = "right_text",
    ) -> None:
        super().__init__(
            key, right_share, normalize=normalize, normalizer=normalizer, verbose=verbose
        )
