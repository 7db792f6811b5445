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


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Counts word edits between paired texts, words split at white space.

    Raises ValueError if the numbers of references and hypotheses differ.
    """
    import jiwer

    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references but {len(hypotheses)} hypotheses; pair each with one"
        )
    if not references:
        return WordErrors()
    output = jiwer.process_words(list(references), list(hypotheses))
    words = [len(reference.split()) for reference in references]
    return WordErrors(
        insertions=output.insertions,
        deletions=output.deletions,
        substitutions=output.substitutions,
        reference_words=sum(words),
        utterances=len(references),
        empty_references=words.count(0),
    )


@functools.lru_cache
def text_normalizer(name: str | bool | None) -> Normalizer:
    """The normalizer of a name: `english` (or True), `basic`, or none (None, False, `none`).

    Both are Whisper's: lower case, no punctuation. `english` also writes numbers and contractions
    in one way. Raises ValueError for another name.
    """
    if name is None or name is False or str(name).lower() == "none":
        return str
    if name is True or name == "english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer()
    if name == "basic":
        from whisper_normalizer.basic import BasicTextNormalizer

        return BasicTextNormalizer()
    raise ValueError(f"use_normalizer={name!r} is unknown; use english, basic or none")
