"""Word error rate over a corpus, its counts, and text normalisation."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Normalizer = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class WordErrors:
    """Counts over a corpus; rates divide them by the reference words."""

    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0
    reference_words: int = 0
    utterances: int = 0
    empty_references: int = 0
    """Utterances without reference words; all hypothesis words there are insertions."""

    @property
    def errors(self) -> int:
        """All word edits between references and hypotheses."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float | None:
        """Errors per reference word; None without reference words."""
        return self.rate(self.errors)

    def rate(self, count: int) -> float | None:
        """A count per reference word; None without reference words, so never NaN or infinite."""
        return count / self.reference_words if self.reference_words else None

    def plain(self) -> dict[str, float | int | None]:
        """The counts and their rate by name, for JSON."""
        return {
            "wer": self.wer,
            "insertions": self.insertions,
            "deletions": self.deletions,
            "substitutions": self.substitutions,
            "reference_words": self.reference_words,
            "utterances": self.utterances,
        }


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], *, merge_compounds: bool = False
) -> WordErrors:
    """Counts word edits between paired texts, words split at white space.

    With `merge_compounds` words that differ only in spaces (`any more` and `anymore`) are no error,
    as the Open ASR Leaderboard scores English (kaldialign's `merge_compounds`). Raises ValueError
    if the numbers of references and hypotheses differ.
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references but {len(hypotheses)} hypotheses; pair each with one"
        )
    if not references:
        return WordErrors()
    words = [reference.split() for reference in references]
    insertions, deletions, substitutions = (
        _compounds_merged(words, [text.split() for text in hypotheses])
        if merge_compounds
        else _edits(references, hypotheses)
    )
    return WordErrors(
        insertions=insertions,
        deletions=deletions,
        substitutions=substitutions,
        reference_words=sum(map(len, words)),
        utterances=len(references),
        empty_references=words.count([]),
    )


def _edits(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[int, int, int]:
    """Insertions, deletions and substitutions."""
    import jiwer

    output = jiwer.process_words(
        [single_spaced(text) for text in references], [single_spaced(text) for text in hypotheses]
    )
    return output.insertions, output.deletions, output.substitutions


def single_spaced(text: str) -> str:
    """Words with one space between them: jiwer splits at spaces, not at other white space."""
    return " ".join(text.split())


def _compounds_merged(
    references: list[list[str]], hypotheses: list[list[str]]
) -> tuple[int, int, int]:
    """Insertions, deletions and substitutions, as the Open ASR Leaderboard counts them."""
    import kaldialign

    found = kaldialign.batch_error_rate(references, hypotheses, merge_compounds=True)
    return int(found["ins"]), int(found["del"]), int(found["sub"])


NORMALIZERS = ("english", "basic", "leaderboard", "none")
"""The names that `text_normalizer` knows; True is english, False and None are none."""


def merges_compounds(normalizer: str | bool | None) -> bool:
    """Whether texts of this normalizer are scored as the Open ASR Leaderboard scores English."""
    return normalizer == "leaderboard"


def check_normalizer(name: str | bool | None) -> None:
    """Raises ValueError for a name that `text_normalizer` does not know."""
    if not (name is None or isinstance(name, bool) or name in (*NORMALIZERS, "None")):
        raise ValueError(f"use_normalizer={name!r} is unknown; use {', '.join(NORMALIZERS)}")


@functools.lru_cache
def text_normalizer(name: str | bool | None) -> Normalizer:
    """The normalizer of a name, one of `NORMALIZERS`, as a function from text to text.

    All but none give lower case without punctuation. `basic` and `english` are Whisper's: `english`
    (or True) also writes numbers and contractions in one way. `leaderboard` is the Open ASR
    Leaderboard's for English. None and False are none. Raises ValueError for another name.
    """
    if name is True or name == "english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer()
    if name == "basic":
        from whisper_normalizer.basic import BasicTextNormalizer

        return BasicTextNormalizer()
    if name == "leaderboard":
        from speechlm2_jax.evaluation.metrics.leaderboard import LeaderboardNormalizer

        return LeaderboardNormalizer()
    check_normalizer(name)
    return str
