"""BLEU (Papineni et al. 2002), and the share of empty texts."""

from collections.abc import Sequence

from speechlm2_jax.evaluation.metrics.text_metric import AnyNormalizer, TextMetric


def corpus_bleu(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """BLEU of a corpus, 0 to 100: sacrebleu's 13a tokenizer, exponential smoothing, 4-grams."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score)


def empty_share(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """The share of hypotheses that are empty or white space."""
    return sum(not text.strip() for text in hypotheses) / len(hypotheses)


class BLEU(TextMetric):
    """`txt_bleu_SET` and `txt_bleu`: BLEU of texts, 0 to 100."""

    def __init__(
        self,
        normalize: bool = True,
        normalizer: AnyNormalizer = "english",
        verbose: bool = False,
        *,
        key: str = "txt_bleu",
    ) -> None:
        super().__init__(
            key, corpus_bleu, normalize=normalize, normalizer=normalizer, verbose=verbose
        )


class EmptyTextRate(TextMetric):
    """`empty_text_rate_SET` and `empty_text_rate`: the share of empty hypotheses."""

    def __init__(self, verbose: bool = False, *, key: str = "empty_text_rate") -> None:
        super().__init__(key, empty_share, normalize=False, verbose=verbose)
