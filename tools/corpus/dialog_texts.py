"""The questions of the bundled dialogs, in several wordings, and the agent's response to each.

`dialog_questions.txt` has a block for each question: a line `= response`, then a line for each
wording. A wording that begins with `v ` is of the validation set, one with `t ` of the test, the
others of the training. The user may pause at `|`: until there nobody can know the question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("dialog_questions.txt")
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
BACK_CHANNELS = ("okay", "uh huh", "yeah", "right", "i see")
"""What a user says while the agent goes on."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """A question in the two halves between which the user may pause."""

    begin: str
    rest: str

    @property
    def text(self) -> str:
        """The whole."""
        return f"{self.begin} {self.rest}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the agent responds, whatever the wording."""

    response: str
    wordings: Mapping[str, Sequence[Wording]]
    """By split."""


def questions() -> list[Question]:
    """All questions, in the order of the file."""
    blocks = FILE.read_text().strip().split("\n\n")
    return [_question(block.splitlines()) for block in blocks]


def _question(lines: Sequence[str]) -> Question:
    found: dict[str, list[Wording]] = {split: [] for split in SPLITS}
    for line in lines[1:]:
        mark, _, rest = line.partition(" ")
        split = {"v": VALIDATION, "t": TEST}.get(mark, TRAIN)
        begin, _, end = (line if split == TRAIN else rest).partition(" | ")
        found[split].append(Wording(begin=begin, rest=end))
    return Question(response=lines[0].removeprefix("= "), wordings=found)
