"""Beam search and greedy decoding with processors equal transformers': tokens and scores."""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.generation import salm as loops
from speechlm2_jax.generation.decoding import DecodingConfig, Prompts
from speechlm2_jax.inference.request.generation_request import read_request
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.llm.decoder import Decoder
from tests.parity.test_llm import DATA, goldens, load, to_right_padding

RECORDED = json.loads((DATA / "generation.json").read_text())
SHORT = json.loads((DATA / "generation_short.json").read_text())
FILLING = 1
SCORE_ATOL = 1e-4  # a sum of log-probabilities of a whole model in fp32


class Words:
    text_eos_id = None
    text_pad_id = FILLING
    text_vocab_size = 368


@partial(jax.jit, static_argnames="graphdef")
def generate(
    graphdef: Any,
    variables: Variables,
    ids: jax.Array,
    mask: jax.Array,
    config: DecodingConfig,
) -> loops.GenerationOutput:
    decoder: Decoder = merge(graphdef, variables)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    prompts = Prompts(decoder.embed(ids), lengths, mask, ids=ids)
    state = loops.prefill(decoder, prompts, config)
    return loops.read_outputs(loops.decode(decoder, state, config, config.max_new_tokens), config)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_tokens_and_scores_equal_the_original(family: str) -> None:
    cases = {name: case for name, case in RECORDED.items() if name.startswith(f"{family}/")}
    programs = generate._cache_size()
    compare(family, cases)
    # length penalties are numbers: greedy, processed, and one program per kind of early stopping
    assert generate._cache_size() - programs <= 4


def test_one_new_token_equals_the_original() -> None:
    compare("llama", SHORT)


def compare(family: str, cases: dict[str, Any]) -> None:
    golden, _ = goldens(family)
    mask = golden["attention_mask"].astype(bool)
    ids, mask = (to_right_padding(x, mask) for x in (golden["input_ids"], mask))
    for name, case in cases.items():
        request = read_request(Words(), case["keys"])
        config = request.fitting(request.limits(mask.sum(axis=1)))
        ours = generate(*load(family)[:2], ids.astype(np.int32), mask, config)
        width = len(case["sequences"][0])
        np.testing.assert_array_equal(ours.ids[:, :width], case["sequences"], err_msg=name)
        np.testing.assert_array_equal(ours.ids[:, width:], FILLING, err_msg=name)
        if case["scores"] is not None:
            np.testing.assert_allclose(ours.scores, case["scores"], atol=SCORE_ATOL, err_msg=name)
