"""Word times of the bundled encoder against the synthesizer's own, on the bundled test set."""

import json

import pytest

from speechlm2_jax.models.aligners import open_aligner
from tools import word_times


def test_the_table_has_the_words_of_the_test_set():
    table = [json.loads(line) for line in word_times.TABLE.read_text().splitlines()]
    manifest = (word_times.ROOT / "corpus" / "test.jsonl").read_text().splitlines()
    for row, line in zip(table, manifest, strict=True):
        listed = json.loads(line)
        assert (row["audio_filepath"], row["text"]) == (listed["audio_filepath"], listed["text"])
        assert len(row["starts"]) == len(row["ends"]) == len(row["text"].split())
        times = [t for pair in zip(row["starts"], row["ends"], strict=True) for t in pair if t]
        assert times == sorted(times) and times[0] > 0 and times[-1] < listed["duration"]
    known = [t for row in table for t in row["starts"] if t is not None]
    assert len(known) > 1500


@pytest.mark.slow
def test_words_begin_and_end_where_the_synthesizer_tells():
    aligner = open_aligner(word_times.ENCODER)
    rows = word_times.read_table(word_times.TABLE, aligner.sampling_rate)
    errors = word_times.measure(rows, aligner)
    assert errors.unfitting == 0
    assert word_times.mean_ms(errors.starts) <= 80 and word_times.share_close(errors.starts) >= 0.9
    assert word_times.mean_ms(errors.ends) <= 80 and word_times.share_close(errors.ends) >= 0.9
