"""Processors equal transformers', as its own generate assembles them from a GenerationConfig."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.generation.processors import History, process
from speechlm2_jax.inference.request.generation_request import read_request

DATA = Path(__file__).parents[1] / "data" / "llm"
ATOL = 1e-5
FACTS = json.loads((DATA / "processors.json").read_text())
GOLDEN = load_file(DATA / "processors.safetensors")
PROMPT, NEW = FACTS["prompt"], FACTS["new_tokens"]


run = jax.jit(process)


class Vocabulary:
    """The attributes of a tokenizer that a request reads."""

    text_eos_id = 2
    text_pad_id = 0
    text_vocab_size = GOLDEN["logits"].shape[1]


def processed(options: dict[str, Any], generated: int, logits: np.ndarray) -> np.ndarray:
    """Scores after `generated` tokens; the ids that are not generated yet are garbage."""
    request = read_request(Vocabulary(), {"eos_token_id": FACTS["eos"], **options})
    batch = len(GOLDEN["ids"])
    history = History(
        ids=jnp.asarray(np.where(np.arange(PROMPT + NEW) < PROMPT + generated, GOLDEN["ids"], 7)),
        first=jnp.zeros(batch, jnp.int32),
        end=jnp.int32(PROMPT + generated),
        generated=jnp.int32(generated),
        prompt_length=jnp.full(batch, PROMPT, jnp.int32),
        limit=jnp.full(batch, NEW, jnp.int32),
    )
    return np.asarray(run(jnp.asarray(logits), history, request.decoding.processors))


@pytest.mark.parametrize("name", FACTS["cases"])
def test_processors_equal_the_original(name: str) -> None:
    counts = [int(key.split("/")[1]) for key in GOLDEN if key.startswith(f"{name}/")]
    assert counts
    for count in counts:
        ours = processed(FACTS["cases"][name], count, GOLDEN["logits"])
        np.testing.assert_allclose(ours, GOLDEN[f"{name}/{count}"], atol=ATOL, err_msg=str(count))


def test_invalid_scores_are_replaced_as_in_the_original() -> None:
    ours = processed({"remove_invalid_values": True}, 0, GOLDEN["invalid"])
    np.testing.assert_allclose(ours, GOLDEN["remove_invalid_values/0"], rtol=1e-6)


def test_the_first_token_can_be_forced_and_suppression_then_begins_at_the_second() -> None:
    options = {"forced_bos_token_id": 4, "begin_suppress_tokens": [9]}
    first, second = (processed(options, count, GOLDEN["logits"]) for count in (0, 1))
    np.testing.assert_array_equal(np.isfinite(first), np.broadcast_to(np.arange(24) == 4, (4, 24)))
    np.testing.assert_array_equal(np.isneginf(second), np.broadcast_to(np.arange(24) == 9, (4, 24)))
