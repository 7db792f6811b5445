"""Greedy decoding may be asked for in every usual way; one new token is enough for beams."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.generation.sampling import SamplingConfig
from speechlm2_jax.inference.request.generation_request import ANY_VOCABULARY, read_request
from speechlm2_jax.models import SALM

DATA = Path(__file__).parents[1] / "data"
PROMPTS = [[{"role": "user", "content": text}] for text in ("What time is it?", "Yes")]
GREEDY = [
    dict(zip(("temperature", "top_k", "top_p"), values, strict=True))
    for values in itertools.product((0, 0.0, 1.0), (-1, 0, 1, 50), (0, 0.0, 1))
]


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(DATA / "salm" / "llama_adapter_hf").eval()


def read(**keys):
    return read_request(ANY_VOCABULARY, keys)


@pytest.mark.parametrize("asked", [{}, {"do_sample": False}])
def test_ways_to_ask_for_greedy_decoding_are_one(asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to tell of: that is what was asked for
        assert {read(**asked, **keys).decoding for keys in GREEDY} == {read().decoding}


def test_temperature_zero_is_greedy_decoding(model):
    want = model.generate(PROMPTS, max_new_tokens=4)
    got = model.generate(PROMPTS, max_new_tokens=4, do_sample=False, temperature=0.0, top_p=0)
    np.testing.assert_array_equal(got, want)


def test_unread_values_are_numbers_all_the_same():
    for wrong in ("cold", [0.0], float("nan"), True):
        with pytest.raises(ValueError, match="temperature=.* must be a positive number"):
            read(temperature=wrong)


def test_sampling_at_temperature_zero_names_the_way_out():
    with pytest.raises(ValueError, match=r"temperature=0 must be .*; or do_sample=False"):
        read(do_sample=True, temperature=0)
    with pytest.raises(ValueError, match=r"top_k=-2 must be a whole number; 0 or -1 keeps"):
        read(do_sample=True, top_k=-2)


def test_limits_that_keep_all_or_one_token_draw_as_such(model):
    drawn = dict(do_sample=True, max_new_tokens=6, seed=3)
    every = model.generate(PROMPTS, **drawn, top_k=0)
    np.testing.assert_array_equal(model.generate(PROMPTS, **drawn, top_k=-1), every)
    greedy = model.generate(PROMPTS, max_new_tokens=6)
    np.testing.assert_array_equal(model.generate(PROMPTS, **drawn, top_p=0.0), greedy)


def test_a_duplex_model_takes_them_too():
    SamplingConfig(temperature=0.0, top_k=-1, top_p=0.0)
    SamplingConfig(do_sample=True, top_k=-1, top_p=0.0)
    with pytest.raises(ValueError, match="do_sample=False"):
        SamplingConfig(do_sample=True, temperature=0.0)


@pytest.mark.parametrize("keys", [{}, {"length_penalty": 0.0}, {"do_sample": True}])
def test_one_new_token_of_several_beams(model, keys):
    beams = dict(num_beams=2, max_new_tokens=1, num_return_sequences=2, **keys)
    ids = model.generate(PROMPTS, **beams)[:, -1].reshape(2, 2)
    assert (ids[:, 0] != ids[:, 1]).all()
    if "do_sample" not in keys:
        best = model.generate(PROMPTS, max_new_tokens=1)[:, -1]
        np.testing.assert_array_equal(ids[:, 0], best)


def test_no_new_token_is_refused_as_in_transformers():
    with pytest.raises(ValueError, match="max_new_tokens=0 must be a whole number from 1"):
        read(max_new_tokens=0)
