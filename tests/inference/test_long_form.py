"""Invariants of long recordings: chunks cover them; text of an overlap appears once."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from speechlm2_jax.evaluation.metrics.wer import word_errors
from speechlm2_jax.inference.long_form.chunks import Chunk, cut
from speechlm2_jax.inference.long_form.join_texts import find_overlap, join

ROOT = Path(__file__).parents[2]
RATE_HZ = 1000
WORD_S = 0.4
GAP_S = 0.1
"""Of silence before and after each word."""
LONG_S = 32.0
"""Its overlaps hold three words of any length: of two, misheard at both edges, nothing is left."""
FEW_WORDS = st.sampled_from(["the", "cat", "Sat", "on", "mat"])


def spoken(durations_s):
    """A recording of one tone per word, silence between; and where each word lies, in samples."""
    wave, places = [], []
    silence = np.zeros(int(GAP_S * RATE_HZ), np.float32)
    for seconds in durations_s:
        start = sum(map(len, wave)) + len(silence)
        samples = int(seconds * RATE_HZ)
        tone = np.sin(np.arange(samples), dtype=np.float32)
        wave += [silence, tone, silence]
        places.append((start, start + samples))
    return np.concatenate(wave), places


def transcribed(words, places, chunk, broken="~"):
    """The transcript of a perfect ASR model: words at the edges are broken."""
    text = []
    for word, (start, end) in zip(words, places, strict=True):
        if chunk.start <= start and end <= chunk.end:
            text.append(word)
        elif max(start, chunk.start) < min(end, chunk.end):
            text.append(broken)
    return text


def with_errors_at_edges(texts):
    """The first and last word of each text misheard, where another text has them too."""
    for number, text in enumerate(texts):
        if number and text:
            text[0] = f"x{number}"
        if number + 1 < len(texts) and len(text) > 1:
            text[-1] = f"y{number}"
    return texts


@given(
    samples=st.integers(0, 30_000),
    max_s=st.sampled_from([1.0, 2.5, 8.0]),
    seed=st.integers(0, 9),
)
def test_chunks_cover_a_recording_overlap_and_are_short_enough(samples, max_s, seed):
    wave = np.random.default_rng(seed).normal(size=samples).astype(np.float32)
    chunks = cut(wave, rate_hz=RATE_HZ, max_s=max_s)
    assert chunks[0].start == 0 and chunks[-1].end == samples
    assert all(chunk.end - chunk.start <= max_s * RATE_HZ for chunk in chunks)
    for one, other in zip(chunks, chunks[1:], strict=False):
        assert one.start < other.start < one.end < other.end
        assert one.end - other.start >= max_s * RATE_HZ / 16
        assert 0 < one.after <= 1 and 0 < other.before <= 1
    assert (chunks[0].before, chunks[-1].after) == (0, 0)
    assert len(chunks) <= 1 + samples / (max_s * RATE_HZ / 2)


def test_what_is_short_or_has_no_limit_is_one_chunk():
    wave = np.zeros(4000, np.float32)
    assert cut(wave, rate_hz=RATE_HZ, max_s=4.0) == [Chunk(0, 4000)]
    assert cut(wave, rate_hz=RATE_HZ, max_s=None) == [Chunk(0, 4000)]
    assert len(cut(wave, rate_hz=RATE_HZ, max_s=3.9)) == 2, "silence too is cut"


def test_cuts_lie_in_silence():
    wave, places = spoken([WORD_S] * 40)
    chunks = cut(wave, rate_hz=RATE_HZ, max_s=8.0)
    assert len(chunks) > 2
    edges = [c.end for c in chunks[:-1]] + [c.start for c in chunks[1:]]
    assert not any(start <= edge < end for edge in edges for start, end in places)


@given(words=st.lists(FEW_WORDS, min_size=40, max_size=80), errors=st.booleans())
def test_joined_chunks_are_the_text_though_words_are_repeated(words, errors):
    wave, places = spoken([WORD_S] * len(words))
    chunks = cut(wave, rate_hz=RATE_HZ, max_s=9.0)
    texts = [transcribed(words, places, chunk) for chunk in chunks]
    if errors:
        texts = with_errors_at_edges(texts)
    assert join([" ".join(text) for text in texts], chunks) == " ".join(words)


@given(
    count=st.integers(140, 300),
    longest_s=st.floats(0.15, 0.6),
    seed=st.integers(0, 9999),
    errors=st.booleans(),
)
def test_joined_chunks_are_the_text_however_long_its_words(count, longest_s, seed, errors):
    rng = np.random.default_rng(seed)
    words = [f"w{n}" for n in rng.integers(0, count, count)]
    wave, places = spoken(rng.uniform(0.15, longest_s, count))
    chunks = cut(wave, rate_hz=RATE_HZ, max_s=LONG_S)
    assert len(chunks) > 1
    texts = [transcribed(words, places, chunk) for chunk in chunks]
    if errors:
        texts = with_errors_at_edges(texts)
    assert join([" ".join(text) for text in texts], chunks) == " ".join(words)


def test_an_overlap_ignores_case_and_punctuation_and_wrong_words():
    first = "We went home. Then we slept, untl".split()
    second = "ome then we sleept until noon".split()
    keep, skip = find_overlap(first, second, (5.0, 5.0))
    assert first[:keep] + second[skip:] == "We went home. Then we sleept until noon".split()
    assert find_overlap(first, [], (0.0, 0.0)) == (len(first), 0)
    assert find_overlap([], second, (0.0, 0.0)) == (0, 0)


def test_where_nothing_agrees_no_word_is_repeated():
    keep, skip = find_overlap(["a", "b", "c", "d"], ["e", "f", "g", "h"], (2.0, 2.0))
    assert (keep, skip) == (3, 1), "half of the overlap each"
    assert find_overlap(["a", "b"], ["c"], (0.0, 0.0)) == (2, 0), "a silent overlap holds no words"


def test_a_lone_text_stays_as_it_is():
    assert join(["two  spaces\n"], [Chunk(0, 5)]) == "two  spaces\n"


@pytest.mark.slow
def test_a_long_recording_is_transcribed_as_its_parts_are():
    from speechlm2_jax.models import CTCModel

    corpus = ROOT / "corpus"
    rows = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["condition"] == "clean"][:40]
    waves = [soundfile.read(corpus / r["audio_filepath"], dtype="float32")[0] for r in rows]
    waves = [np.pad(wave, (0, 8000)) for wave in waves]
    model = CTCModel.from_pretrained(ROOT / "configs" / "parts" / "tiny_encoder.nemo")
    whole = np.concatenate(waves)
    chunks = cut(whole, rate_hz=16_000, max_s=12.0)
    assert len(chunks) > 10
    joined = join(model.transcribe([whole[c.start : c.end] for c in chunks]), chunks)
    reference = " ".join(row["text"] for row in rows)
    parts = [np.concatenate(waves[n : n + 3]) for n in range(0, len(waves), 3)]
    apart = word_errors([reference], [" ".join(model.transcribe(parts))])
    errors = word_errors([reference], [joined])
    assert errors.wer < apart.wer + 0.05
    assert errors.insertions + errors.deletions <= apart.insertions + apart.deletions + 5
    assert not re.search(r"\b(\w+ \w+ \w+) \1\b", joined), "nothing is repeated"
