"""Texts without recordings as conversations: plain lines, pairs of lines, and JSON lines."""

import logging
import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from speechlm2_jax.data.conversations import Conversation, TextTurn
from speechlm2_jax.data.input_config import Paths
from speechlm2_jax.data.json_lines import json_lines, text_lines
from speechlm2_jax.data.manifest_options import ManifestOptions
from speechlm2_jax.data.manifest_values import check_text_key, located, missing_key, shown, text
from speechlm2_jax.data.paths import expand_shards, local_file
from speechlm2_jax.settings import SettingsError

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_SFT_ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
_SFT_TURNS = ("conversations", "system")
_log = logging.getLogger(__name__)


def read_text_lines(paths: Sequence[str], options: ManifestOptions) -> Iterator[Conversation]:
    """Each line of plain text as a response without a prompt; blank lines are left out.

    Raises SettingsError for a missing or damaged file and for text that is not UTF-8.
    """
    for path in map(local_file, expand_shards(paths)):
        for where, line in text_lines(path):
            if (made := text_of_line(line, options, where)) is not None:
                yield made


def text_of_line(line: str, options: ManifestOptions, where: str) -> Conversation | None:
    """A line of plain text as a conversation; None for a blank one."""
    if not line.strip():
        return None
    return _conversation(where, [TextTurn(role=ASSISTANT, text=line)], options)


def read_text_json(paths: Sequence[str], options: ManifestOptions) -> Iterator[Conversation]:
    """The text of each JSON line, under `text_field`, as a response without a prompt.

    Lines without one are left out with a warning, as in NeMo. Raises SettingsError for a wrong
    line, and for a file in which no line has a text.
    """
    for path in map(local_file, expand_shards(paths)):
        missing, found = "", 0
        for where, row in json_lines(path):
            with located(where):
                made = text_of_object(row, options, where)
            if made is None:
                missing = missing or f"{where}: {missing_key(row, options.text_field)}"
                continue
            found += 1
            yield made
        if missing and not found:
            raise SettingsError(f"{missing}; set text_field")
        if missing:
            _log.warning("lines without a text are left out, the first: %s", missing)


def text_of_object(
    row: dict[str, Any], options: ManifestOptions, where: str
) -> Conversation | None:
    """The text of an object as a conversation; None without one."""
    check_text_key(row, options.text_field)
    value = row.get(options.text_field)
    if value is None:
        return None
    own = {key: other for key, other in row.items() if key != options.text_field}
    turns = [TextTurn(role=ASSISTANT, text=text(value, options.text_field))]
    return _conversation(where, turns, options, own)


def read_text_pairs(
    sources: Paths,
    targets: Paths,
    options: ManifestOptions,
    *,
    questions: str | None = None,
) -> Iterator[Conversation]:
    """Pairs of lines of two files as the user's turn and the response.

    Args:
        sources: the user's files.
        targets: the files of the responses, line by line the same.
        options: how they become conversations; `question_role` is the role of a question.
        questions: a file of which a line, drawn by `options.seed`, comes before each source; as in
            NeMo for an integer `shard_seed` without `shuffle`.

    Raises SettingsError for a missing file, and for files of different lengths.
    """
    asked, draws = questions_of(questions), None
    if asked:
        draws = QuestionDraws(len(asked), options.seed)
    for source, target in paths_of_pairs(sources, targets):
        for where, both in _pairs(source, target):
            question = None if draws is None else asked[draws.next()]
            yield pair_of_lines(where, *both, question, options)


def paths_of_pairs(sources: Paths, targets: Paths) -> list[tuple[Path, Path]]:
    """The files of pairs. Raises SettingsError for a missing one, or more of one than another."""
    source_paths, target_paths = expand_shards(sources), expand_shards(targets)
    if len(source_paths) != len(target_paths):
        raise SettingsError(
            f"target_paths: {len(target_paths)} files, but source_paths has {len(source_paths)}; "
            "list one for each, in the same order"
        )
    both = zip(source_paths, target_paths, strict=True)
    return [(local_file(source), local_file(target)) for source, target in both]


def pair_of_lines(
    where: str, source: str, target: str, question: str | None, options: ManifestOptions
) -> Conversation:
    """A line of the user and one of the response as a conversation, behind a question if any."""
    turns = [
        TextTurn(role=USER, text=source.strip()),
        TextTurn(role=ASSISTANT, text=target.strip()),
    ]
    if question is not None:
        turns.insert(0, TextTurn(role=options.question_role, text=question))
    return _conversation(where, turns, options)


def read_sft(paths: Sequence[str], options: ManifestOptions) -> Iterator[Conversation]:
    """Chats of NeMo's SFT files: JSON lines with `conversations` of User and Assistant.

    A `system` that is not empty is the system turn. Raises SettingsError for a wrong line.
    """
    for path in map(local_file, expand_shards(paths)):
        for where, row in json_lines(path):
            with located(where):
                made = chat_of_object(row, options, where)
            yield made


def chat_of_object(row: dict[str, Any], options: ManifestOptions, where: str) -> Conversation:
    """A row of NeMo's SFT files as a conversation. Raises SettingsError for a wrong one."""
    fields = {key: value for key, value in row.items() if key not in _SFT_TURNS}
    return _conversation(where, _chat(row), options, fields)


def _chat(row: dict[str, Any]) -> list[TextTurn]:
    turns = row.get("conversations")
    if turns is None:
        raise SettingsError(missing_key(row, "conversations"))
    if not isinstance(turns, list) or not turns:
        raise SettingsError(f"conversations must be a list of turns, got {shown(turns)}")
    made = [TextTurn(role=SYSTEM, text=text(row["system"], "system"))] if row.get("system") else []
    for number, turn in enumerate(turns, start=1):
        with located(f"turn {number}"):
            name = turn.get("from") if isinstance(turn, dict) else None
            role = _SFT_ROLES.get(name.lower()) if isinstance(name, str) else None
            if role is None:
                raise SettingsError(f"from must be User or Assistant, got {shown(name)}")
            made.append(TextTurn(role=role, text=text(turn.get("value"), "value")))
    return made


def questions_of(path: str | None) -> list[str]:
    """The questions of a file; none without one. Raises SettingsError for a file without any."""
    if path is None:
        return []
    lines = [line.strip() for _, line in text_lines(local_file(path))]
    if not lines:
        raise SettingsError(f"{path}: no question in it")
    return lines


class QuestionDraws:
    """Which question comes before each pair of an entry, one after the other.

    Args:
        questions: how many there are.
        seed: of what is drawn.
    """

    def __init__(self, questions: int, seed: int) -> None:
        self._numbers, self._seed = range(questions), seed
        self._restart()

    def next(self) -> int:
        """The number of the next pair's."""
        self._at += 1
        return self._draws.choice(self._numbers)

    def go_to(self, pair: int) -> None:
        """Makes a pair, from 0, the next one."""
        if pair < self._at:
            self._restart()
        while self._at < pair:
            self.next()

    def _restart(self) -> None:
        self._draws, self._at = random.Random(self._seed), 0  # noqa: S311


def _pairs(source: Path, target: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Line by line, the words that name it and both texts."""
    for here, there in zip_longest(text_lines(source), text_lines(target)):
        if here is None or there is None:
            raise fewer_lines(source, target) if here is None else fewer_lines(target, source)
        yield here[0], (here[1], there[1])


def fewer_lines(shorter: Path, longer: Path) -> SettingsError:
    """What to say of two files that are no pairs of lines."""
    return SettingsError(f"{shorter}: has fewer lines than {longer}; each line is one of a pair")


def _conversation(
    where: str,
    turns: Sequence[TextTurn],
    options: ManifestOptions,
    own: dict[str, Any] | None = None,
) -> Conversation:
    name = None if own is None else own.get("id")
    return Conversation(
        id=where if name is None else str(name),
        turns=tuple(turns),
        token_equivalent_duration_s=options.token_equivalent_duration_s,
        fields=options.all_fields(own or {}),
        where=where,
    )
