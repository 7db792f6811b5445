"""Whether responses follow instructions about one recording: their form, then their content.

The form of the reference tells what was asked for, so a set may mix instructions:

| form | example | right if |
|---|---|---|
| spelling | `m a r k e t` | equal to the reference |
| phrase, of up to four words | `at the market` | equal to the reference |
| question | `did anna buy two hats` | at most 20 % word errors |
| sentence | `anna bought two hats` | at most 20 % word errors |
"""

import re
from collections.abc import Mapping, Sequence

from speechlm2_jax.evaluation.metrics.wer import merges_compounds, text_normalizer, word_errors

PHRASE_WORDS = 4
"""A phrase has at most so many words."""
MOST_WORD_ERRORS = 0.2
"""Share of the reference's words up to which a sentence or question is right."""
SPELLING, PHRASE, QUESTION, SENTENCE = "spelling", "phrase", "question", "sentence"
AUXILIARIES = frozenset(
    "am are can could did do does had has have is may might must shall should was were will "
    "would".split()
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def form_of(text: str) -> str | None:
    """The form of a response; None without words."""
    words = _WORD.findall(text.lower())
    if not words:
        return None
    if len(words) > 1 and all(len(word) == 1 for word in words):
        return SPELLING
    if words[0] in AUXILIARIES:
        return QUESTION
    return PHRASE if len(words) <= PHRASE_WORDS else SENTENCE


def is_right(reference: str, hypothesis: str, normalizer: str | bool | None) -> bool:
    """Whether a response has the form of the reference and its content."""
    form = form_of(reference)
    if form is None or form_of(hypothesis) != form:
        return False
    normalize = text_normalizer(normalizer)
    texts = [normalize(reference)], [normalize(hypothesis)]
    if form in (SPELLING, PHRASE):
        return texts[0][0].split() == texts[1][0].split()
    errors = word_errors(*texts, merge_compounds=merges_compounds(normalizer))
    return errors.errors <= MOST_WORD_ERRORS * errors.reference_words


def details(pairs: Sequence[tuple[str, str]], normalizer: str | bool | None) -> Mapping[str, float]:
    """Responses of the asked form, then by form those of this form and those that are right.

    All in percent of the references; those without words are left out.
    """
    asked: dict[str, list[bool]] = {}
    right: dict[str, list[bool]] = {}
    for reference, hypothesis in pairs:
        if (form := form_of(reference)) is not None:
            asked.setdefault(form, []).append(form_of(hypothesis) == form)
            right.setdefault(form, []).append(is_right(reference, hypothesis, normalizer))
    if not asked:
        return {}
    found = {"of the asked form": _percent([one for form in asked for one in asked[form]])}
    for form in (SENTENCE, SPELLING, PHRASE, QUESTION):
        if form in asked:
            found[f"{form}, asked form"] = _percent(asked[form])
            found[f"{form}, right"] = _percent(right[form])
    return found


def _percent(values: Sequence[bool]) -> float:
    return 100.0 * sum(values) / len(values)
