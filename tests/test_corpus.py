"""The bundled corpus: what it promises, and that nothing of its test was seen while training."""

import json
import lzma
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tools import make_tiny_llm

ROOT = Path(__file__).parents[1]
CORPUS, TOOLS = ROOT / "corpus", ROOT / "tools" / "corpus"
UNSEEN_VOICES = {"en-us_m7", "en-gb_f2"}
DIGITS = set("zero one two three four five six seven eight nine".split())
RUN = 5  # words in a row that a test sentence may share with no training text


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text().splitlines()]


def lines_of(name: str) -> list[str]:
    return (TOOLS / f"{name}.txt").read_text().splitlines()


def runs_of(texts) -> set[tuple[str, ...]]:
    split = [text.split() for text in texts]
    return {tuple(words[i : i + RUN]) for words in split for i in range(len(words) - RUN + 1)}


def variant_of(voice: str) -> str:
    return voice.rsplit("_", 1)[1]


@pytest.fixture(scope="module")
def train():
    return rows_of("train")


@pytest.fixture(scope="module")
def validation():
    return rows_of("validation")


@pytest.fixture(scope="module")
def test():
    return rows_of("test")


@pytest.fixture(scope="module")
def pretraining():
    packed = sorted(TOOLS.glob("pretraining_*.jsonl.xz"))
    assert packed
    text = "".join(lzma.decompress(path.read_bytes()).decode() for path in packed)
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def synthesis():
    sys.path.insert(0, str(TOOLS))
    try:
        import synthesis
        import texts
    finally:
        sys.path.remove(str(TOOLS))
    return synthesis, texts


def test_counts_of_rows_sentences_and_words(train, validation, test):
    assert len(train) >= 1200 and len(test) >= 240
    assert len({row["text"] for row in train}) >= 750
    assert len({row["text"] for row in test}) >= 230
    taught = (*train, *validation)
    words = Counter(word for row in taught for word in set(row["text"].split()))
    assert {word for row in train for word in row["text"].split()} == set(words)
    assert 500 <= len(words) <= 700
    assert all(words[digit] >= 25 for digit in DIGITS)
    assert np.mean([count >= 4 for count in words.values()]) > 0.98


def test_validation_sentences_are_in_no_training_row(train, validation):
    assert len(validation) >= 60
    assert not {row["text"] for row in validation} & {row["text"] for row in train}
    assert {row["voice"] for row in validation} <= {row["voice"] for row in train}


def test_manifests_hold_the_committed_sentences(train, validation, test):
    taught = {row["text"] for row in (*train, *validation)}
    assert taught == set(lines_of("train_sentences"))
    assert {row["text"] for row in test} == set(lines_of("test_sentences"))


def test_every_transcript_is_lower_case_words(train, test, pretraining):
    word = re.compile(r"[a-z]+('[a-z]+)?")
    for row in (*train, *test, *pretraining):
        assert all(word.fullmatch(part) for part in row["text"].split(" ")), row["text"]


def test_every_test_word_is_in_at_least_three_training_sentences(test):
    words = Counter(word for line in set(lines_of("train_sentences")) for word in set(line.split()))
    rare = {word for row in test for word in row["text"].split() if words[word] < 3}
    assert not rare


def test_no_test_sentence_shares_five_words_in_a_row_with_any_training_text(
    train, test, pretraining, synthesis
):
    sentences = [row["text"] for row in (*train, *pretraining)]
    sentences += [*lines_of("train_sentences"), *lines_of("pretraining_sentences")]
    sentences += synthesis[0].BABBLE_SENTENCES
    seen = runs_of(sentences)
    shared = {row["text"] for row in test if runs_of([row["text"]]) & seen}
    assert not shared
    assert not {row["text"] for row in test} & set(sentences)


def test_the_language_model_read_nothing_of_the_test(test):
    texts = make_tiny_llm.training_texts()
    dialogs = make_tiny_llm.dialogs(texts, make_tiny_llm.DIALOGS, make_tiny_llm.TRAIN_SEED)
    turns = [turn["value"] for d in islice(dialogs, 20_000) for turn in d["conversations"]]
    seen = runs_of([*texts, *turns])
    assert not [row["text"] for row in test if runs_of([row["text"]]) & seen]


def test_no_two_test_sentences_share_five_words_in_a_row(test):
    texts = {row["text"] for row in test}
    count = Counter(run for text in texts for run in runs_of([text]))
    assert not [run for run, times in count.items() if times > 1]


def test_no_test_sentence_has_five_digits_in_a_row(test):
    # strings of digits are drawn while training speech is made, so they cannot be listed before
    assert not [run for run in runs_of(row["text"] for row in test) if set(run) <= DIGITS]


def test_unseen_voices_are_in_the_test_alone(train, test, pretraining, synthesis):
    unseen = {variant_of(voice) for voice in UNSEEN_VOICES}
    for row in (*train, *pretraining):
        assert variant_of(row["voice"]) not in unseen
    of_the_test = {row["voice"] for row in test} - {row["voice"] for row in train}
    assert of_the_test == UNSEEN_VOICES
    share = np.mean([row["voice"] in UNSEEN_VOICES for row in test])
    assert 0.25 <= share <= 0.35
    for voices in (synthesis[0].VOICES, synthesis[0].PRETRAINING_VOICES):
        assert not unseen & {voice.variant for voice in voices}


def test_babble_behind_the_test_is_spoken_by_training_voices(synthesis):
    assert set(synthesis[0].BABBLE_VOICES) <= set(synthesis[0].VOICES)


def test_voices_speeds_pitches_and_conditions_are_many_and_even(train):
    voices = Counter(row["voice"] for row in train)
    assert len(voices) >= 18 and min(voices.values()) >= 0.5 * max(voices.values())
    assert len({row["speed"] for row in train}) >= 20 and len({row["pitch"] for row in train}) >= 20
    conditions = [row["condition"] for row in train]
    assert 0.2 <= np.mean([name != "clean" for name in conditions]) <= 0.4
    for kind in ("white", "pink", "hum", "babble", "room"):
        assert any(kind in name for name in conditions)


def test_every_utterance_lasts_one_and_a_half_to_six_seconds(train, test):
    durations = [row["duration"] for row in (*train, *test)]
    assert min(durations) >= 1.5 and max(durations) <= 6.0
    assert sum(durations) > 3000


def test_manifests_list_the_folders_files_once(train, validation, test):
    listed = [row["audio_filepath"] for row in (*train, *validation, *test)]
    found = {path.relative_to(CORPUS).as_posix() for path in (CORPUS / "audio").rglob("*.ogg")}
    assert len(listed) == len(set(listed)) and set(listed) == found


def test_files_decode_to_16_khz_mono_speech_of_the_stated_duration(train, test):
    for row in (*train[:: len(train) // 12], *test[:: len(test) // 8]):
        wave, rate_hz = soundfile.read(CORPUS / row["audio_filepath"], dtype="float32")
        assert rate_hz == 16000 and wave.ndim == 1
        assert wave.size / rate_hz == pytest.approx(row["duration"], abs=1e-3)
        assert 0.005 < np.sqrt(np.mean(wave**2)) < 0.3
        assert np.abs(wave).max() < 1.0
        words_a_second = len(row["text"].split()) / row["duration"]
        assert 0.8 < words_a_second < 5.5


def test_folder_is_at_most_ten_megabytes():
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= 10e6


def test_file_names_tell_nothing_of_the_text(train, test):
    for row in (*train, *test):
        assert re.fullmatch(r"audio/(train|test)/\d{4}\.ogg", row["audio_filepath"])


def test_walks_follow_from_the_training_sentences_alone(synthesis):
    texts = synthesis[1]
    assert texts.walked_texts() == texts.random_walks(
        texts.training_texts(), texts.WALKS, texts.SEED
    )


def test_pretraining_manifest_holds_only_known_texts(pretraining):
    known = {*lines_of("train_sentences"), *lines_of("pretraining_sentences")}
    vocabulary = {word for line in lines_of("train_sentences") for word in line.split()}
    for row in pretraining:
        words = row["text"].split()
        is_digits = len(words) <= 7 and set(words) <= DIGITS
        is_glued = 4 <= len(words) <= 11 and set(words) <= vocabulary
        assert row["text"] in known or is_digits or is_glued, row["text"]
