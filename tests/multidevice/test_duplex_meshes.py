"""The duplex models train and generate the same on one device and on a mesh of eight."""

import re

import jax
import numpy as np
import pytest

from speechlm2_jax.sharding import make_sharding, place
from tests.parity.duplex_golden import batch_of, examples, pretrained
from tests.parity.salm_golden import five_steps

MESHES = {
    "duplex_s2s": dict(data=2, fsdp=2, tensor=2),
    "duplex_s2s_speech_decoder_cfg": dict(fsdp=2, tensor=2, context=2, sequence_parallel=True),
}


@pytest.fixture(
    scope="module",
    params=[
        "duplex_s2s",
        pytest.param("duplex_s2s_speech_decoder_cfg", marks=pytest.mark.slow),
    ],
)
def run(request):
    return request.param


@pytest.fixture(scope="module")
def model(run):
    return pretrained(run)


def trained(model, sharding):
    conversations = examples("pair") + examples("rest")[:2]
    batch = batch_of(model, conversations, groups=sharding.data_parallel_size)
    return five_steps(model, batch, sharding, steps=2, rates=[1e-3, 1e-3])


@pytest.mark.slow  # a minute; the parts of a duplex model are among the fast ones
def test_a_mesh_equals_one_device(model, run):
    one = trained(model, make_sharding(devices=jax.devices()[:1]))
    many = trained(model, make_sharding(**MESHES[run]))
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(many.gradient_norms, one.gradient_norms, rtol=1e-4)
    for path, expected in one.gradients.items():
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(
            many.gradients[path] / scale, expected / scale, atol=2e-5, err_msg=path
        )
    if run == "duplex_s2s":  # a speech decoder exchanges steps for rows on a context axis
        assert not re.findall(r"\ball-to-all(?:-start)?\(", many.program)


def test_a_mesh_generates_as_one_device_does(model, run):
    signal = examples()[0].source_audio[None, :12000].repeat(2, axis=0)
    signal[1] *= 0.5
    lengths = np.array([12000, 9000])
    alone = model.offline_inference(signal, lengths, decode_audio=False)
    sharding = make_sharding(**MESHES[run])
    axes = {path: info.axes for path, info in model.infos.items()}
    before, model.variables = model.variables, place(model.variables, axes, sharding)
    try:
        shared = model.offline_inference(signal, lengths, decode_audio=False)
    finally:
        model.variables = before
    for key in ("tokens_text", "tokens_audio", "tokens_len"):
        np.testing.assert_array_equal(shared[key], alone[key])
