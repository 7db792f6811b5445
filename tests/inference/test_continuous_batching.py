"""Invariants of continuous batching: tokens equal `generate`, few compiled programs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechlm2_jax.inference import slot_table
from speechlm2_jax.layers import ragged_attention
from speechlm2_jax.layers.paged_cache import PagedCache
from speechlm2_jax.llm import caches
from speechlm2_jax.models import SALM
from tests.layers.ragged_kernel import written_out

DATA = Path(__file__).parents[1] / "data"
TAG_TEXTS = ["Repeat after me: {}", "What is {}?", "{}"]
LENGTHS = (7300, 5120, 3000, 6400, 4000, 7000, 2500, 6000, 5500)
"""Samples of each prompt's recording: prompts of one static shape."""

DRAWN = dict(do_sample=True, temperature=1.5, seed=3, no_repeat_ngram_size=2, min_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(DATA / "salm" / "llama_adapter_hf").eval()


@pytest.fixture(scope="module")
def prompts(model):
    wave = soundfile.read(DATA / "salm" / "audio" / "a0.wav", dtype="float32")[0]

    def dialog(number, samples):
        text = TAG_TEXTS[number % 3].format(model.audio_locator_tag)
        audio = [np.roll(wave, 997 * number)[:samples]]
        return [{"role": "user", "content": text, "audio": audio}]

    return [dialog(number, samples) for number, samples in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def stops(model, prompts):
    """End ids with which responses have many lengths."""
    ids = model.generate(prompts, max_new_tokens=16, eos_token_id=[model.text_eos_id] * 5)
    stops = [
        model.text_eos_id,
        *(int(ids[row, at]) for row, at in [(0, 3), (1, 9), (2, 5), (3, 12)]),
    ]
    lengths = (np.cumsum(np.isin(ids, stops), axis=1) == 0).sum(axis=1)
    assert len(set(lengths)) > 3
    return stops


def by_number(rounds):
    responses = dict(response for ended in rounds for response in ended)
    return [responses[number].tolist() for number in range(len(responses))]


def trimmed(model, ids, stops):
    """Responses up to their first end token, which is part of them."""
    ends = [np.flatnonzero(np.isin(row, stops)) for row in ids]
    return [row[: e[0] + 1 if len(e) else None].tolist() for row, e in zip(ids, ends, strict=True)]


def programs():
    parts = (slot_table._empty, slot_table._admit, slot_table._run)
    return [part._cache_size() for part in parts]


@pytest.mark.parametrize("drawn", [{}, DRAWN])
def test_responses_are_those_of_generate_in_two_programs(model, prompts, stops, drawn):
    asked = dict(max_new_tokens=16, eos_token_id=stops, **drawn)
    expected = trimmed(model, model.generate(prompts, **asked), stops)
    rounds = list(model.generate_each(iter(prompts), slots=4, **asked))
    assert by_number(rounds) == expected
    assert len(rounds) > 2, "responses come as they end"
    before = programs()
    order = [0, *range(len(prompts))[::-1]]
    again = by_number(model.generate_each((prompts[n] for n in order), slots=4, **asked))
    assert programs() == before, "whoever comes and goes"
    if not drawn:
        assert again == [expected[n] for n in order]


def test_responses_from_pages_are_those_of_generate(model, prompts, stops, monkeypatch):
    """The cache that TPUs have, with what their kernel computes written out."""
    asked = dict(max_new_tokens=16, eos_token_id=stops)
    expected = trimmed(model, model.generate(prompts, **asked), stops)
    monkeypatch.setattr(caches, "implementation", lambda case: "ragged")
    monkeypatch.setattr(ragged_attention, "kernel", written_out)
    made = []
    empty = PagedCache.empty
    monkeypatch.setattr(PagedCache, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[0])
    forget: Any = slot_table._empty  # its programs do not know that the table was changed
    forget.clear_cache()
    found = by_number(model.generate_each(iter(prompts), slots=4, **asked))
    forget.clear_cache()
    assert made and found == expected


def test_prompts_are_drawn_as_slots_become_free(model, prompts, stops):
    taken = []
    stream = (taken.append(n) or prompt for n, prompt in enumerate(prompts))
    rounds = model.generate_each(stream, slots=4, max_new_tokens=16, eos_token_id=stops)
    assert not taken
    next(rounds)
    assert len(taken) <= 6, "four slots and the next to wait"
    rounds.close()


@pytest.mark.slow
def test_a_longer_prompt_and_a_recording_in_chunks_find_room(model, prompts, caplog):
    long = [{**prompts[0][0], "audio": [np.tile(prompts[0][0]["audio"][0], 5)]}]
    text = [{"role": "user", "content": "What time is it, and where? " * 6}]
    mixed = [*prompts[:2], long, text, prompts[2]]
    asked = dict(max_new_tokens=16, max_audio_s=1.0)
    responses = by_number(model.generate_each(mixed, slots=4, **asked))
    assert "prompt 2: 2.3 s of audio" in caplog.text
    together = model.generate(mixed, **asked)
    for own, row in zip(responses, together, strict=True):
        assert own == row[: len(own)].tolist() and (row[len(own) :] == model.text_pad_id).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_beams=2), "num_beams: beam search: not supported by generate_each"),
        (dict(stop_strings="a"), "stop_strings: not supported by generate_each"),
        (dict(max_time=1.0), "max_time: not supported by generate_each"),
        (dict(max_length=40), r"max_length \(use max_new_tokens\): not supported by generate_each"),
        (dict(slots=0), "slots=0 must be at least 1"),
    ],
)
def test_what_needs_whole_batches_is_refused_at_the_call(model, prompts, wrong, message):
    with pytest.raises(ValueError, match=message):
        model.generate_each(prompts, **wrong)


def test_processors_that_look_at_a_prompt_of_text_are_refused(model):
    text = [{"role": "user", "content": "What time is it?"}]
    with pytest.raises(
        ValueError, match="prompt 0 has no audio: generate_each does not support repetition_penalty"
    ):
        next(model.generate_each([text], repetition_penalty=1.5))


def test_a_prompt_that_cannot_be_used_is_named_after_the_responses_before_it(model, prompts):
    asked = dict(max_new_tokens=4)
    expected = by_number(model.generate_each(prompts[:6], slots=4, **asked))
    nan = [{**prompts[0][0], "audio": [np.full(4000, np.nan, np.float32)]}]
    missing = [{**prompts[0][0], "audio": ["nowhere.wav"]}]
    for bad in (nan, missing, prompts[0][0], [], [{"role": "nobody", "content": ""}]):
        rounds = []
        with pytest.raises(ValueError, match="^prompt 6"):
            rounds.extend(model.generate_each([*prompts[:6], bad, prompts[6]], slots=4, **asked))
        assert by_number(rounds) == expected
