"""Word alignment of reference and hypothesis."""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, cast

from speechlm2_jax.evaluation.metrics.wer import single_spaced

Operation = Literal["equal", "substitute", "delete", "insert"]


@dataclass(frozen=True, kw_only=True)
class AlignedWord:
    """One position of an alignment."""

    operation: Operation
    reference: str = ""
    """Empty for an insertion."""
    hypothesis: str = ""
    """Empty for a deletion."""


def align_words(reference: str, hypothesis: str) -> tuple[AlignedWord, ...]:
    """Aligns two texts, words split at white space, with the fewest edits."""
    import jiwer

    output = jiwer.process_words([single_spaced(reference)], [single_spaced(hypothesis)])
    (reference_words,), (hypothesis_words,) = output.references, output.hypotheses
    return tuple(
        AlignedWord(operation=cast(Operation, chunk.type), reference=one, hypothesis=other)
        for chunk in output.alignments[0]
        for one, other in zip_longest(
            reference_words[chunk.ref_start_idx : chunk.ref_end_idx],
            hypothesis_words[chunk.hyp_start_idx : chunk.hyp_end_idx],
            fillvalue="",
        )
    )
