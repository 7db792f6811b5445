"""SALM equals NeMo 3.0.0: inputs, logits, loss, gradients, AdamW steps, accuracy, generations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from transformers import GenerationConfig

from speechlm2_jax.layers.module import bind
from speechlm2_jax.models import SALM
from speechlm2_jax.networks import salm as network_maths
from speechlm2_jax.networks.salm import SalmModes
from tests.parity.salm_golden import (
    BATCH_OF,
    DATA,
    IGNORED_TARGET,
    RUNS,
    facts,
    golden_batch,
    left_padded,
    make_model,
    tensors,
    under,
    working_in,
)

ACTIVATION_ATOL = 1e-4
"""goldens README: activations of a whole model in fp32."""
LOSS_RTOL = 1e-5
GRADIENT_ATOL = 1e-4
STEPS = 5


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return request.param


@pytest.fixture(scope="module")
def model(run):
    return make_model(run)


@pytest.fixture(scope="module")
def batch(model, run):
    return jax.tree.map(jnp.asarray, golden_batch(model, run))


def _lengths(batch):
    return np.asarray((batch.segments > 0).sum(-1)).reshape(-1)


def test_inputs_equal_nemo(model, run, batch):
    network = bind(model._definition, model.variables)
    inputs = network_maths.prepare(network, batch, SalmModes())
    golden = tensors(run if run not in BATCH_OF else BATCH_OF[run])
    got = left_padded(np.asarray(inputs.embeds), _lengths(batch))
    mask = golden["eval/attention_mask"].astype(bool)
    np.testing.assert_allclose(
        got[mask], golden["eval/input_embeds"][mask], atol=ACTIVATION_ATOL, rtol=0
    )
    targets = np.where(batch.loss_mask, batch.targets, IGNORED_TARGET)[0]
    shifted = np.full_like(targets, IGNORED_TARGET)
    for i, n in enumerate(_lengths(batch)):
        shifted[i, targets.shape[1] - n :] = targets[i, :n]
    np.testing.assert_array_equal(shifted, golden["eval/target_ids"])


def test_logits_equal_nemo(model, run, batch):
    if run in BATCH_OF:
        return  # recorded with the adapter and LoRA runs, whose weights at the start are the same
    network = bind(model._definition, model.variables)
    inputs = network_maths.prepare(network, batch, SalmModes())
    hidden = network_maths.forward(network, inputs.embeds, batch, SalmModes())
    logits = left_padded(np.asarray(network.llm.logits(hidden)), _lengths(batch))[:, -24:]
    mask = tensors(run)["eval/attention_mask"].astype(bool)[:, -24:]
    np.testing.assert_allclose(
        logits[mask], tensors(run)["eval/logits_last24"][mask], atol=ACTIVATION_ATOL, rtol=0
    )


def test_public_forward_takes_left_padding(model, run):
    golden = tensors(BATCH_OF.get(run, run))
    if run in BATCH_OF:
        return
    mask = golden["eval/attention_mask"].astype(bool)
    logits = model(golden["eval/input_embeds"], attention_mask=mask)["logits"][:, -24:]
    np.testing.assert_allclose(
        np.asarray(logits)[mask[:, -24:]],
        golden["eval/logits_last24"][mask[:, -24:]],
        atol=ACTIVATION_ATOL,
        rtol=0,
    )
