"""Generation on a mesh: activations move, weights stay, key and value heads lie in groups."""

import re

import jax
import numpy as np
import pytest

from speechlm2_jax.inference import generate
from speechlm2_jax.models import SALM
from speechlm2_jax.sharding import for_inference, key_value_copies, make_sharding, place, use
from tests.parity.salm_golden import DATA, golden_examples

MESHES = {
    "fsdp=8": dict(fsdp=8),
    "tensor=4 data=2": dict(tensor=4, data=2),  # two key and value heads on four devices
    "fsdp=4 tensor=2": dict(fsdp=4, tensor=2),
    "data=4 tensor=2": dict(data=4, tensor=2),
}

SLOW = ("fsdp=8", "tensor=4 data=2")


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(DATA / "llama_adapter_hf")


@pytest.mark.parametrize(
    "mesh", ["fsdp=4 tensor=2", *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)]
)
def test_decoding_moves_no_weight(model, mesh, monkeypatch):
    """The program that decodes gathers no weight, and its tokens are those of one device."""
    examples = golden_examples("llama_adapter")[:3]
    alone = model.answer(examples, 8)
    programs = []

    def decode(graphdef, *arguments, compiled=generate.decode):
        *arrays, placement = arguments
        leaves, tree = jax.tree.flatten(tuple(arrays))
        flat = jax.jit(
            lambda *x: jax.tree.leaves(compiled(graphdef, *tree.unflatten(x), placement))
        )
        programs.append(flat.lower(*leaves).compile().as_text())
        return compiled(graphdef, *arguments)

    monkeypatch.setattr(generate, "decode", decode)
    axes = {path: info.axes for path, info in model.infos.items()}
    before = model.variables
    model.variables = place(before, axes, make_sharding(**MESHES[mesh]))
    try:
        np.testing.assert_array_equal(model.answer(examples, 8), alone)
    finally:
        model.variables = before
    rows = 8 // MESHES[mesh].get("tensor", 1)  # of the batch, padded to the data-parallel devices
    sent = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* (?:all-\w+|reduce-scatter|permute)", programs[0])
    assert sent, "a mesh on which nothing is sent"
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in sent]
    width = model.infos["llm.layers.attention.query.weight"].shape[-1]
    assert max(sizes) <= 2 * rows * width, sent


@pytest.mark.slow  # compiles four programs for eight devices
@pytest.mark.parametrize("mesh", ["data=4 tensor=2", "fsdp=8"])
def test_continuous_batching_on_a_mesh(model, mesh):
    """Nine prompts on eight slots give the tokens of one device, each prompt once."""
    wave = golden_examples("llama_adapter")[0].audio[0]
    content = f"Repeat after me: {model.audio_locator_tag}"
    prompts = [
        [{"role": "user", "content": content, "audio": [np.roll(wave, 997 * n)[: 7300 - 300 * n]]}]
        for n in range(9)
    ]
    asked = dict(max_new_tokens=8, do_sample=True, temperature=1.5, seed=3)
    alone = model.generate(prompts, **asked)
    axes = {path: info.axes for path, info in model.infos.items()}
    before = model.variables
    model.variables = place(before, axes, make_sharding(**MESHES[mesh]))
    try:
        rounds = list(model.generate_each(prompts, slots=8, **asked))
    finally:
        model.variables = before
    ids = dict(response for ended in rounds for response in ended)
    assert sorted(ids) == list(range(9))
    for number, expected in enumerate(alone):
        np.testing.assert_array_equal(ids[number], expected[: len(ids[number])])
        assert len(ids[number]) == 8 or ids[number][-1] in model.end_ids


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_drafts_on_a_mesh(model, mesh):
    """Speculative decoding has the tokens of one device; some drafts are right, others not."""
    prompts = [[{"role": "user", "content": text}] for text in ("Yes", "No. Why?", "When?") * 3]
    asked = dict(max_new_tokens=8, do_sample=True, temperature=1.5, seed=3)
    alone = model.generate(prompts, **asked)
    drafts = [model.tokenizer.ids_to_text(ids[-8:]) for ids in alone]
    axes = {path: info.axes for path, info in model.infos.items()}
    before = model.variables
    model.variables = place(before, axes, make_sharding(**MESHES[mesh]))
    try:
        for source in (dict(drafts=drafts), dict(prompt_lookup_num_tokens=3)):
            np.testing.assert_array_equal(model.generate(prompts, **asked, **source), alone)
    finally:
        model.variables = before


def test_heads_are_held_in_groups_only_where_they_are_too_few():
    def copies(heads, query_heads, **sizes):
        with use(for_inference(make_sharding(**sizes).mesh)):
            return key_value_copies(heads, query_heads)

    assert copies(2, 8, tensor=8) == 4
    assert copies(8, 8, tensor=8) == 1
    assert copies(2, 4, tensor=8) == 1  # four query heads cannot be split over eight
    assert copies(3, 24, tensor=8) == 1
    with use(make_sharding(tensor=8)):  # training: gradients of the copies would have to be summed
        assert key_value_copies(2, 8) == 1
    assert key_value_copies(2, 8) == 1, "one device"
    assert len(jax.devices()) == 8
