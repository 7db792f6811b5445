"""English of a wide vocabulary, for speech that an encoder learns from.

    apt-get install wordnet-base r-cran-janeaustenr

Example sentences and definitions of WordNet 3.0 (Princeton University, its own free licence), and
phrases of Jane Austen's novels (public domain), in lower-case words of a to z and the apostrophe.
What has numbers, abbreviations or words of other alphabets is left out.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WORDNET = Path("/usr/share/wordnet")
WORDS = (3, 16)
"""Texts have at least so many words, and at most."""
LONGEST_WORD = 14
LEFT_OUT_WORDS = frozenset("mr mrs messrs dr st esq vol etc ie eg".split())
LEFT_OUT_KINDS = ("05", "20")  # WordNet's animals and plants: mostly Latin names
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def dictionary_texts() -> list[str]:
    """Returns WordNet's example sentences and definitions, in the order of its files.

    Raises FileNotFoundError without the package.
    """
    texts: dict[str, None] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{kind}").read_text("latin-1").splitlines():
            if line.startswith(" ") or line.split(" ", 2)[1] in LEFT_OUT_KINDS:
                continue
            gloss = line.partition(" | ")[2]
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = re.sub(r"\([^)]*\)", " ", gloss.partition('"')[0])
            for part in [*examples, *definition.split(";")]:
                if text := plain_words(part):
                    texts[text] = None
    return list(texts)


def novel_texts() -> list[str]:
    """Returns the phrases of Jane Austen's novels between two marks of punctuation, in order.

    Raises FileNotFoundError without R, and CalledProcessError without the package.
    """
    script = "library(janeaustenr); cat(austen_books()$text, sep='\\n')"
    done = subprocess.run(["Rscript", "-e", script], capture_output=True, text=True, check=True)
    phrases = re.split(r"[.;:!?\"()\n]\s|--|\n\s*\n", done.stdout.replace("_", ""))
    texts = (plain_words(phrase.replace("\n", " ")) for phrase in phrases)
    return list(dict.fromkeys(text for text in texts if text))


def plain_words(phrase: str) -> str:
    """Returns a phrase in lower-case words, or "" for one that is not plain English or too long."""
    if re.search(r"[^A-Za-z' ,.;:!?\-\n]|[A-Z]{2}|\b\w\.", phrase):
        return ""
    words = re.sub(r"[,.;:!?\-]", " ", phrase.lower()).split()
    whole = LEFT_OUT_WORDS.isdisjoint(words) and all(
        _WORD.fullmatch(word) and len(word) <= LONGEST_WORD for word in words
    )
    return " ".join(words) if whole and WORDS[0] <= len(words) <= WORDS[1] else ""


def shuffled(texts: list[str], rng: np.random.Generator) -> Iterator[str]:
    """Gives each text once, in a random order, and then again."""
    while True:
        yield from (texts[i] for i in rng.permutation(len(texts)))
