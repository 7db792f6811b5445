"""The recipes instructions and combined: what is asked for, and that their keys count."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.evaluation.inputs import read_inputs
from speechlm2_jax.evaluation.metrics.instructions import form_of
from tests.tools.recipe_case import check_salm_recipe
from tools import prepare_instructions
from tools.corpus import instructions

FORMS = {"transcribe": "sentence", "spell": "spelling", "question": "phrase", "form": "question"}
SENTENCE = instructions.Sentence(
    who="my sister",
    verb=("hide", "hid", "hidden"),
    auxiliary="did",
    number="three",
    things="pictures",
    place="at the market",
    time="on sunday",
)
RATE_HZ, SECONDS = 16_000, 2.0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the program writes, its speech replaced by tones."""
    folder = tmp_path_factory.mktemp("prepared")

    def tone(_utterance):
        return np.full(int(SECONDS * RATE_HZ), 0.1, np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_instructions, "synthesize", tone)
        patch.setattr(prepare_instructions, "ProcessPoolExecutor", SameProcess)
        prepare_instructions.main(folder / "instructions", train=20, test=9)
    return folder


class SameProcess:
    """A pool without processes, which would not see what a test replaces."""

    def __init__(self, _processes):
        """Ignores the number of processes."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, function, jobs, chunksize):
        return map(function, jobs)


def rows_of(folder: Path, name: str) -> list[dict]:
    lines = (folder / f"instructions/{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def turn(row: dict, number: int) -> str:
    return row["conversations"][number]["value"]


def test_what_is_asked_of_a_sentence():
    assert SENTENCE.text == "my sister hid three pictures at the market on sunday"
    assert SENTENCE.as_question == "did my sister hide three pictures at the market on sunday"
    assert SENTENCE.questions() == [
        ("who hid the pictures", "my sister"),
        ("how many pictures are there", "three"),
        ("what did my sister hide", "pictures"),
        ("where did my sister hide the pictures", "at the market"),
        ("when did my sister hide the pictures", "on sunday"),
    ]
    perfect = replace(SENTENCE, auxiliary="has", time="")
    assert perfect.text == "my sister has hidden three pictures at the market"
    assert perfect.as_question == "has my sister hidden three pictures at the market"
    assert not any(question.startswith("when") for question, _ in perfect.questions())


def test_a_spelt_word_is_named_by_its_place():
    rng = np.random.default_rng(0)
    words = "the dog saw the small house".split()
    named = {instructions.spelling(" ".join(words), rng) for _ in range(50)}
    assert named == {
        ("last word", "h o u s e"),
        ("word after small", "h o u s e"),
    }, "the has two places, and short words can be guessed"
    assert instructions.spelling("go up", rng)[1] in ("g o", "u p")


def test_each_recording_has_the_four_kinds_in_their_forms(prepared):
    for name, recordings in (("train", 20), ("validation", 1), ("test", 9), ("test_wordings", 9)):
        rows = rows_of(prepared, name)
        assert len(rows) == 4 * recordings
        for i, row in enumerate(rows):
            kind = row["id"].rsplit("_", 1)[1]
            assert kind == instructions.KINDS[i % 4]
            assert form_of(turn(row, 2)) == FORMS[kind], turn(row, 2)


def test_no_sentence_is_in_two_sets_and_new_wordings_are_new(prepared):
    texts = {
        name: {turn(row, 2) for row in rows_of(prepared, name) if row["id"].endswith("transcribe")}
        for name in ("train", "validation", "test", "test_wordings")
    }
    assert texts["test"] == texts["test_wordings"]
    assert not (texts["train"] & texts["test"] or texts["train"] & texts["validation"])
    for wordings in instructions.WORDINGS.values():
        assert not set(wordings.train) & set(wordings.test)
    unseen = {turn(row, 0) for row in rows_of(prepared, "test_wordings")}
    assert not unseen & {turn(row, 0) for row in rows_of(prepared, "train")}
    assert unseen >= set(instructions.WORDINGS["transcribe"].test)


def test_the_corpus_has_what_any_text_can_be_asked(prepared):
    rows = rows_of(prepared, "corpus")
    assert {form_of(turn(row, 2)) for row in rows} >= {"sentence", "spelling"}
    assert {row["id"].rsplit("_", 1)[1] for row in rows} == {"transcribe", "spell"}
    assert all(Path(turn(row, 1)).exists() for row in rows[:10])


def test_every_third_test_recording_has_a_voice_that_training_lacks():
    sentences = instructions.draw_sentences(9, np.random.default_rng(0))
    train, test = (prepare_instructions.plan(sentences, is_test=one) for one in (False, True))
    unseen = {voice.name for voice in prepare_instructions.TEST_VOICES}
    assert [u.voice.name in unseen for u in test] == [True, False, False] * 3
    assert not any(u.voice.name in unseen for u in train)


def test_a_recording_that_is_there_is_kept(tmp_path, monkeypatch):
    def fail(_utterance):
        raise AssertionError("a recording is there")

    monkeypatch.setattr(prepare_instructions, "synthesize", fail)
    path = tmp_path / "00000.flac"
    soundfile.write(path, np.zeros(RATE_HZ), RATE_HZ)
    (utterance,) = prepare_instructions.plan([SENTENCE], is_test=False)
    assert prepare_instructions.write_recording((utterance, path)) == 1.0


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_a_sentence_is_read(tmp_path):
    (utterance,) = prepare_instructions.plan([SENTENCE], is_test=True)
    seconds = prepare_instructions.write_recording((utterance, tmp_path / "00000.flac"))
    assert 1.5 < seconds < 6.0


def test_a_row_is_an_input_of_an_evaluation(prepared):
    rows = rows_of(prepared, "test")
    found = read_inputs(str(prepared / "instructions/test.jsonl"))
    assert [u.text for u in found] == [turn(row, 2) for row in rows]
    assert found[0].dialog.turns[0].text == turn(rows[0], 0)
    assert len(found[0].dialog.clips) == 1


def test_every_key_of_the_recipe_is_known(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    check_salm_recipe("instructions")


def test_every_key_of_the_combined_recipe_is_known(prepared, monkeypatch):
    row = {"audio_filepath": "a.flac", "duration": SECONDS, "text": "one"}
    for folder, names in (
        ("barista", ("train", "train_trimmed", "synthetic", "validation", "noise")),
        ("ljspeech", ("train", "validation")),
    ):
        (prepared / folder).mkdir()
        soundfile.write(prepared / folder / "a.flac", np.zeros(int(SECONDS * RATE_HZ)), RATE_HZ)
        for name in names:
            (prepared / folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    monkeypatch.chdir(prepared)
    check_salm_recipe("combined")
