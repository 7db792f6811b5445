"""Loss, gradients and statistics are the same on one device and on every mesh of eight."""

import re

import jax
import numpy as np
import pytest

from speechlm2_jax.batches import BatchShape, assemble_salm_batch
from speechlm2_jax.models import SALM
from speechlm2_jax.sharding import RULES, make_sharding, place, use
from tests.parity.salm_golden import DATA, golden_examples

FP32_RTOL = 1e-4
FP32_ATOL = 1e-5
MESHES = {
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module", params=["llama_adapter", "qwen3_lora"])
def run(request):
    return request.param


@pytest.fixture(scope="module")
def model(run):
    return SALM.from_pretrained(DATA / f"{run}_hf")


def _batch(model, run, groups):
    """The recorded conversations dealt to groups, one shape whatever their number."""
    examples = golden_examples(run)
    dealt = [examples[g::groups] for g in range(groups)]
    rows = max(map(len, dealt))
    clips = max(sum(len(e.audio) for e in d) for d in dealt)
    samples = max(len(c) for e in examples for c in e.audio)
    return assemble_salm_batch(
        dealt,
        BatchShape(rows=rows, tokens=72, clips=clips, samples=samples),
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
        pad_id=model.text_pad_id,
    )


def _gradients(model, sharding, batch):
    """Mean loss, gradients and statistics, and the compiled program."""
    axes = {path: info.axes for path, info in model.infos.items()}
    variables = place({p: np.asarray(v) for p, v in model.variables.items()}, axes, sharding)
    names = [p for p, on in model.trainable.items() if np.any(on)]

    def objective(trained, variables, batch):
        with use(sharding):
            losses = model.losses(variables | trained, batch, key=None, train=True)
        return losses.loss.mean(), losses.buffers

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    arguments = ({p: variables[p] for p in names}, variables, sharding.put_batch(batch))
    program = step.lower(*arguments).compile()
    return jax.device_get(program(*arguments)), program.as_text()


@pytest.fixture(scope="module")
def one_device(model, run):
    return _gradients(model, make_sharding(devices=jax.devices()[:1]), _batch(model, run, 1))[0]


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_equal_one(model, run, one_device, mesh):
    sharding = make_sharding(**MESHES[mesh])
    groups = sharding.data_parallel_size
    ((loss, statistics), gradients), text = _gradients(model, sharding, _batch(model, run, groups))
    (expected_loss, expected_statistics), expected = one_device
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(
            gradients[path], expected[path], rtol=FP32_RTOL, atol=FP32_ATOL, err_msg=path
        )
    for path in expected_statistics:
        np.testing.assert_allclose(
            statistics[path], expected_statistics[path], atol=FP32_ATOL, err_msg=path
        )
    if mesh == "data=8":
        # weights are whole on every device, so any all-gather would be one of activations
        assert not re.findall(r"\ball-gather(?:-start)?\(", text)


def test_every_parameter_has_known_logical_axes(model):
    known = {name for name, _ in RULES}
    for path, info in model.infos.items():
        assert len(info.axes) == len(info.shape), path
        assert {a for a in info.axes if a is not None} <= known, path
        if len(info.shape) - info.is_stacked >= 2:
            assert any(a is not None for a in info.axes), path
