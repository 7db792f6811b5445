"""Sentences made of slots, and four kinds of instructions about each.

The kinds are transcribe, spell a word, answer a question, and say it as a question. What is asked
for follows from the slots alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PEOPLE = (
    "my sister;my brother;my mother;my father;the doctor;the teacher;the farmer;our neighbor;"
    "the driver;the girl;the boy;the old man;anna;tom;peter;mary;david;emma"
).split(";")
VERBS = (  # base, past, participle
    ("buy", "bought", "bought"),
    ("find", "found", "found"),
    ("lose", "lost", "lost"),
    ("sell", "sold", "sold"),
    ("bring", "brought", "brought"),
    ("see", "saw", "seen"),
    ("clean", "cleaned", "cleaned"),
    ("leave", "left", "left"),
    ("hide", "hid", "hidden"),
    ("count", "counted", "counted"),
)
NUMBERS = "two three four five six seven eight nine ten eleven twelve twenty".split()
THINGS = (
    "apples books chairs boxes hats keys coats spoons flowers eggs plates cups bags cakes shoes "
    "lamps bottles pictures tickets toys"
).split()
PLACES = (
    "at the market;in the kitchen;in the garden;at the station;in the city;near the river;"
    "at school;at home;in the park;at the beach;in the hotel;on the farm"
).split(";")
TIMES = (
    "on monday;on tuesday;on wednesday;on thursday;on friday;on saturday;on sunday;this morning;"
    "in the evening;in the afternoon;at noon;today"
).split(";")
AUXILIARIES = ("did", "will", "has")
"""Of past, future and perfect; a sentence in the past has none."""
LONG_WORD = 4
"""Letters of a word that is worth spelling; short ones such as "at" can be guessed."""
ABSENT_SHARE = 0.2
"""How often a sentence has no place, and how often no time; one of them is always there."""
KINDS = ("transcribe", "spell", "question", "form")


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Who did what; `place` or `time` may be empty."""

    who: str
    verb: tuple[str, str, str]
    auxiliary: str
    number: str
    things: str
    place: str
    time: str

    @property
    def text(self) -> str:
        """The statement."""
        verb = self.verb[1] if self.auxiliary == "did" else f"{self.auxiliary} {self._main_verb}"
        return self._joined(self.who, verb)

    @property
    def as_question(self) -> str:
        """The statement as a question, to be confirmed or denied."""
        return self._joined(self.auxiliary, self.who, self._main_verb)

    @property
    def _main_verb(self) -> str:
        return self.verb[2 if self.auxiliary == "has" else 0]

    def _joined(self, *words: str) -> str:
        ends = (self.number, self.things, self.place, self.time)
        return " ".join(word for word in (*words, *ends) if word)

    def questions(self) -> list[tuple[str, str]]:
        """Each question about a slot, with the value of the slot."""
        verb = self.verb[1] if self.auxiliary == "did" else f"{self.auxiliary} {self._main_verb}"
        asked = f"{self.auxiliary} {self.who} {self._main_verb}"
        found = [
            (f"who {verb} the {self.things}", self.who),
            (f"how many {self.things} are there", self.number),
            (f"what {asked}", self.things),
            (f"where {asked} the {self.things}", self.place),
            (f"when {asked} the {self.things}", self.time),
        ]
        return [(question, value) for question, value in found if value]


class Wordings(NamedTuple):
    """Wordings of an instruction: those of training, and those of the test alone."""

    train: tuple[str, ...]
    test: tuple[str, ...]


WORDINGS = {
    "transcribe": Wordings(
        (
            "Transcribe:",
            "Repeat:",
            "Write out the sentence.",
            "Repeat the sentence.",
            "Write every word of the recording.",
            "What are the words?",
        ),
        ("Transcribe the recording word for word.", "Please write out every word."),
    ),
    "spell": Wordings(
        (
            "Spell the {}.",
            "Spell: the {}",
            "Spell the {} letter by letter.",
            "How is the {} spelt?",
            "Write the letters of the {}.",
        ),
        ("Please spell the {} for me.", "What are the letters of the {}?"),
    ),
    "question": Wordings(
        ("{}?", "Question: {}?", "In a few words: {}?", "Reply briefly. {}?", "Tell me: {}?"),
        ("Reply in a few words: {}?", "Please tell me briefly: {}?"),
    ),
    "form": Wordings(
        (
            "Turn it into a question.",
            "Make a question of the sentence.",
            "Say it as a question.",
            "Ask whether it is so.",
            "Question form:",
        ),
        (
            "Please turn the sentence into a question.",
            "Say the sentence in the form of a question.",
        ),
    ),
}
"""`{}` stands for a word such as "last word", or for a question."""


def draw_sentence(rng: np.random.Generator) -> Sentence:
    """A sentence with slots drawn at random."""

    def draw(values: Sequence[str]) -> str:
        return values[int(rng.integers(len(values)))]

    absent = rng.choice(["place", "time", ""], p=[ABSENT_SHARE, ABSENT_SHARE, 1 - 2 * ABSENT_SHARE])
    return Sentence(
        who=draw(PEOPLE),
        verb=VERBS[rng.integers(len(VERBS))],
        auxiliary=draw(AUXILIARIES),
        number=draw(NUMBERS),
        things=draw(THINGS),
        place="" if absent == "place" else draw(PLACES),
        time="" if absent == "time" else draw(TIMES),
    )


def draw_sentences(count: int, rng: np.random.Generator) -> list[Sentence]:
    """Sentences with different texts."""
    found: dict[str, Sentence] = {}
    while len(found) < count:
        sentence = draw_sentence(rng)
        found.setdefault(sentence.text, sentence)
    return list(found.values())


def spelling(text: str, rng: np.random.Generator) -> tuple[str, str]:
    """Names a word of a text by its place, and spells it."""
    words = text.split()
    places = [("first word", 0), ("second word", 1), ("last word", len(words) - 1)]
    places += [(f"word after {words[i]}", i + 1) for i in range(len(words) - 1)]
    clear = [(name, i) for name, i in places if _is_clear(name, words)]
    least = min(LONG_WORD, max(len(words[i]) for _, i in clear))
    long_enough = [(name, i) for name, i in clear if len(words[i]) >= least]
    name, index = long_enough[rng.integers(len(long_enough))]
    return name, " ".join(words[index])


def _is_clear(name: str, words: Sequence[str]) -> bool:
    """Whether a place names one word."""
    return not name.startswith("word after ") or words.count(name.split()[-1]) == 1


def of_text(
    text: str, rng: np.random.Generator, *, is_unseen: bool = False
) -> Iterator[tuple[str, str, str]]:
    """(kind, instruction, response) of what any text can be asked: its words, and to spell one."""
    yield "transcribe", _wording("transcribe", "", rng, is_unseen), text
    name, letters = spelling(text, rng)
    yield "spell", _wording("spell", name, rng, is_unseen), letters


def of_sentence(
    sentence: Sentence, rng: np.random.Generator, *, is_unseen: bool = False
) -> Iterator[tuple[str, str, str]]:
    """(kind, instruction, response) of each of KINDS.

    `is_unseen` takes the wordings that training does not have.
    """
    yield from of_text(sentence.text, rng, is_unseen=is_unseen)
    questions = sentence.questions()
    question, value = questions[rng.integers(len(questions))]
    yield "question", _wording("question", question, rng, is_unseen), value
    yield "form", _wording("form", "", rng, is_unseen), sentence.as_question


def _wording(kind: str, slot: str, rng: np.random.Generator, is_unseen: bool) -> str:
    wordings = WORDINGS[kind].test if is_unseen else WORDINGS[kind].train
    return wordings[int(rng.integers(len(wordings)))].format(slot)
