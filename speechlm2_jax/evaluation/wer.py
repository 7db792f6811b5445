"""The old place of `metrics.wer`, kept for scripts that import it."""

from speechlm2_jax.evaluation.metrics.wer import text_normalizer, word_errors

__all__ = ["text_normalizer", "word_errors"]
