"""Loss, gradients and statistics are the same on one device and on every mesh of eight."""

import re
from functools import cache

import jax
import numpy as np
import pytest

from speechlm2_jax.batches import BatchShape, assemble_salm_batch
from speechlm2_jax.models import SALM
from speechlm2_jax.sharding import RULES, make_sharding, place
from tests.parity.salm_golden import DATA, five_steps, golden_examples

STEPS = 80  # a multiple of what a context axis of eight needs
PROMPT = [{"role": "user", "content": "Say something."}]
FP32_RTOL = 1e-4
FP32_ATOL = 1e-5
MESHES = {  # the first two among the slow ones
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
    "fsdp=2 tensor=2 sequence context=2": dict(fsdp=2, tensor=2, context=2, sequence_parallel=True),
    "context=4 fsdp=2": dict(context=4, fsdp=2),
}
MORE_MESHES = {
    "data=2 fsdp=4": dict(data=2, fsdp=4),
    "data=4 tensor=2": dict(data=4, tensor=2),
    "data=4 tensor=2 sequence": dict(data=4, tensor=2, sequence_parallel=True),
    "fsdp=4 tensor=2": dict(fsdp=4, tensor=2),
    "fsdp=4 tensor=2 sequence": dict(fsdp=4, tensor=2, sequence_parallel=True),
    "data=2 fsdp=2 tensor=2 sequence": dict(data=2, fsdp=2, tensor=2, sequence_parallel=True),
    "context=8": dict(context=8),
    "data=2 context=4": dict(data=2, context=4),
    "data=4 context=2": dict(data=4, context=2),
    "data=2 fsdp=2 context=2": dict(data=2, fsdp=2, context=2),
    "tensor=2 context=4": dict(tensor=2, context=4),
    "tensor=2 sequence context=4": dict(tensor=2, context=4, sequence_parallel=True),
    "data=2 tensor=2 context=2": dict(data=2, tensor=2, context=2),
    "data=2 tensor=2 sequence context=2": dict(data=2, tensor=2, context=2, sequence_parallel=True),
    "fsdp=2 tensor=2 context=2": dict(fsdp=2, tensor=2, context=2),
}
"""Every other product that eight devices and two key-value heads allow."""
CASES = [
    *(("llama_adapter", mesh) for mesh in list(MESHES)[2:]),
    ("qwen3_lora", "fsdp=2 tensor=2 sequence context=2"),
]


@pytest.fixture(params=["llama_adapter", "qwen3_lora"])
def run(request):
    return request.param


@cache  # a module's fixture would be made anew for every pair of run and mesh
def _loaded(run):
    return SALM.from_pretrained(DATA / f"{run}_hf")


@pytest.fixture
def model(run):
    return _loaded(run)


def _batch(model, run, groups):
    """The recorded conversations dealt to groups, one shape whatever their number."""
    examples = golden_examples(run)
    dealt = [examples[g::groups] for g in range(groups)]
    rows = max(map(len, dealt))
    clips = max(sum(len(e.audio) for e in d) for d in dealt)
    samples = max(len(c) for e in examples for c in e.audio)
    return assemble_salm_batch(
        dealt,
        BatchShape(sequences=rows, tokens=STEPS, clips=clips, samples=samples),
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
    )


@cache
def _one_device(run):
    sharding = make_sharding(devices=jax.devices()[:1])
    return five_steps(_loaded(run), _batch(_loaded(run), run, 1), sharding, steps=2)


@pytest.mark.parametrize(("run", "mesh"), CASES, indirect=["run"])
def test_eight_devices_equal_one(model, run, mesh):
    _equals_one_device(model, run, mesh, MESHES[mesh])


@pytest.mark.slow  # twenty meshes, twice
@pytest.mark.parametrize("mesh", MESHES | MORE_MESHES)
def test_every_product_equals_one_device(model, run, mesh):
    _equals_one_device(model, run, mesh, (MESHES | MORE_MESHES)[mesh])


def _equals_one_device(model, run, mesh, sizes):
    sharding = make_sharding(**sizes)
    groups = sharding.data_parallel_size
    batch = _batch(model, run, groups)
    many, one = five_steps(model, batch, sharding, steps=2), _one_device(run)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.gradient_norms, one.gradient_norms, rtol=1e-4)
    assert many.gradients.keys() == one.gradients.keys()
    for path, expected in one.gradients.items():
        np.testing.assert_allclose(
            many.gradients[path], expected, rtol=FP32_RTOL, atol=FP32_ATOL, err_msg=path
        )
        # AdamW's first steps are signs of gradients: rounding decides where there is hardly any
        is_sure = np.abs(expected) > 1e-4
        np.testing.assert_allclose(
            many.final[path][is_sure], one.final[path][is_sure], atol=FP32_ATOL, err_msg=path
        )
    for path, expected in one.buffers.items():
        np.testing.assert_allclose(many.buffers[path], expected, atol=FP32_ATOL, err_msg=path)
    assert not re.findall(r"\ball-to-all(?:-start)?\(", many.program)
    if mesh == "data=8":
        # weights are whole on every device, so any all-gather would be one of activations
        assert not re.findall(r"\ball-gather(?:-start)?\(", many.program)
    if sizes.get("sequence_parallel"):
        # what the scan over layers keeps for the backward pass: each device its share of the steps
        layers, width = model.infos["llm.layers.attention.query.weight"].shape[::2]
        shares = sizes["tensor"] * sizes.get("context", 1)
        rows = batch.tokens.shape[1]
        kept = re.findall(rf"f32\[{layers},{rows},(\d+),{width}\]", many.program)
        assert kept and set(kept) == {str(STEPS // shares)}


def test_every_parameter_has_known_logical_axes(model):
    known = {name for name, _ in RULES}
    for path, info in model.infos.items():
        assert len(info.axes) == len(info.shape), path
        assert {a for a in info.axes if a is not None} <= known, path
        if len(info.shape) - info.is_stacked >= 2:
            assert any(a is not None for a in info.axes), path


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **facts: COMPILED.append(event) if "backend_compile" in event else None
)
ASKED = {
    "data=2 fsdp=2 tensor=2": dict(do_sample=True, seed=3, num_return_sequences=2),
    "context=4 fsdp=2": dict(num_beams=2, length_penalty=0.5),
}


@pytest.mark.parametrize(
    ("run", "mesh"),
    [
        *(("llama_adapter", mesh) for mesh in ASKED),
        *(pytest.param("qwen3_lora", mesh, marks=pytest.mark.slow) for mesh in ASKED),
    ],
    indirect=["run"],
)
def test_generated_tokens_do_not_depend_on_the_mesh(model, run, mesh):
    examples = golden_examples(run)[:3]
    alone = model.answer(examples, 8)
    sharding = make_sharding(**MESHES[mesh])
    axes = {path: info.axes for path, info in model.infos.items()}
    before, model.variables = model.variables, place(model.variables, axes, sharding)
    asked = dict(prompts=[PROMPT] * 3, max_new_tokens=8, **ASKED[mesh])
    try:
        np.testing.assert_array_equal(model.answer(examples, 8), alone)
        many = model.generate(**asked)
        COMPILED.clear()
        again = model.generate(**asked, should_stop=lambda: False)
        assert not COMPILED, "every call finds its state where the last one left it"
    finally:
        model.variables = before
    np.testing.assert_array_equal(many, model.generate(**asked))
    np.testing.assert_array_equal(many, again)
