"""What may be said: the training sentences, word sequences made from them, and strings of digits.

`python tools/corpus/texts.py` writes pretraining_sentences.txt anew. Only train_sentences.txt is
read here; the sentences of the test are looked at by make_corpus.py and by a test alone.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

from collections import defaultdict

import numpy as np

HERE = Path(__file__).parent
DIGITS = "zero one two three four five six seven eight nine".split()
WALKS = 3000
WALK_WORDS = (4, 13)
SEED = 20


def training_texts() -> list[str]:
    """Returns the hand-written training sentences, in the order of their file."""
    return (HERE / "train_sentences.txt").read_text().splitlines()


def walked_texts() -> list[str]:
    """Returns the committed word sequences of `random_walks`: English in pairs of words only."""
    return (HERE / "pretraining_sentences.txt").read_text().splitlines()


def digit_text(rng: np.random.Generator) -> str:
    """Returns one to seven digit words; one string in ten is a single digit."""
    count = 1 if rng.random() < 0.1 else int(rng.integers(2, 8))
    return " ".join(rng.choice(DIGITS, count))


def glued_text(sentences: list[str], rng: np.random.Generator) -> str:
    """Returns 4 to 11 words: phrases of one to three words of the sentences, glued together.

    No order of words can be learned by heart from these, so that a recogniser has to listen.
    """
    count, words = int(rng.integers(4, 12)), []
    while len(words) < count:
        source = sentences[rng.integers(len(sentences))].split()
        length = min(int(rng.integers(1, 4)), len(source))
        start = int(rng.integers(len(source) - length + 1))
        words += source[start : start + length]
    return " ".join(words[:count])


def random_walks(sentences: list[str], count: int, seed: int) -> list[str]:
    """Returns distinct word sequences whose every pair of neighbours occurs in a sentence.

    Each starts as a sentence starts, ends as a sentence ends, has 4 to 13 words and is none of the
    sentences.
    """
    followers: dict[str, list[str]] = defaultdict(list)
    for sentence in sentences:
        words = ["", *sentence.split(), ""]  # "" begins and ends a sentence
        for word, follower in zip(words, words[1:], strict=False):
            followers[word].append(follower)
    # rare followers come up oftener than in the sentences, so that all words are met
    choices = {word: sorted(set(after)) + after for word, after in followers.items()}
    rng = np.random.default_rng(seed)
    known, walks = set(sentences), []
    while len(walks) < count:
        walk = _walk(choices, rng)
        if WALK_WORDS[0] <= len(walk) <= WALK_WORDS[1] and (text := " ".join(walk)) not in known:
            known.add(text)
            walks.append(text)
    return walks


def _walk(choices: dict[str, list[str]], rng: np.random.Generator) -> list[str]:
    words: list[str] = []
    while len(words) <= WALK_WORDS[1]:
        after = choices[words[-1] if words else ""]
        word = after[rng.integers(len(after))]
        if not word:
            break
        words.append(word)
    return words


if __name__ == "__main__":
    walks = random_walks(training_texts(), WALKS, SEED)
    (HERE / "pretraining_sentences.txt").write_text("\n".join(walks) + "\n")
    print(f"pretraining_sentences.txt: {len(walks)} lines")
