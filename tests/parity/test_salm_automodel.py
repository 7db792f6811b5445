"""A SALMAutomodel directory of NeMo 3.0.0 loads, computes, trains and saves as there."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.batches import BatchShape, assemble_salm_batch
from speechlm2_jax.conversion.readers import open_weights
from speechlm2_jax.layers.module import merge
from speechlm2_jax.models import SALM
from speechlm2_jax.networks import salm as network_maths
from speechlm2_jax.networks.salm import SalmModes
from speechlm2_jax.training.trainer_config import TrainerConfig
from speechlm2_jax.training.validation import make_validator
from tests.conversion.goldens import assert_same_bits
from tests.conversion.goldens import tensors as read_all
from tests.parity.salm_golden import (
    ACTIVATION_ATOL,
    DATA,
    GRADIENT_ATOL,
    LOSS_RTOL,
    golden_batch,
    golden_examples,
    left_padded,
    under,
)

HF = DATA / "automodel_hf"
FACTS = json.loads((DATA / "automodel.json").read_text())
GOLDEN = load_file(DATA / "automodel.safetensors")
RUN = "qwen3_lora"
"""The SALM whose batch was used."""


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(HF)


@pytest.fixture(scope="module")
def batch(model):
    return jax.tree.map(jnp.asarray, golden_batch(model, RUN))


@pytest.fixture(scope="module")
def gradients(model):
    """A function of a batch: the loss sums, and the gradient of the loss under NeMo's names."""

    def objective(trained, frozen, batch):
        losses = model.losses({**frozen, **trained}, batch, key=None, train=True)
        return losses.loss.mean(), losses.loss

    differentiate = jax.jit(jax.grad(objective, has_aux=True))
    is_trained = {path: np.any(on) for path, on in model.trainable.items()}
    values = {p: np.asarray(v, np.float32) for p, v in model.variables.items()}
    trained = {p: v for p, v in values.items() if is_trained.get(p)}
    frozen = {p: v for p, v in values.items() if p not in trained}

    def compute(batch):
        grads, loss = differentiate(trained, frozen, batch)
        zeros = {p: np.zeros(i.shape, np.float32) for p, i in model.infos.items()}
        return loss, model.state_dict(zeros | jax.device_get(grads))

    return compute


def test_what_nemo_saved_is_saved_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    ours, theirs = open_weights(tmp_path), open_weights(HF)
    # NeMo's file keeps the tied tensor under the head's name
    tied = {"llm.model.embed_tokens.weight", "llm.lm_head.weight"}
    assert {*ours.aliases, *ours.aliases.values()} == tied
    assert {*theirs.aliases, *theirs.aliases.values()} == tied
    renamed = {next(iter(tied)) if n in tied else n: v for n, v in read_all(ours).items()}
    assert_same_bits(
        renamed, {next(iter(tied)) if n in tied else n: v for n, v in read_all(theirs).items()}
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((HF / "config.json").read_text())


def test_logits_equal_nemo(model, batch):
    @jax.jit
    def forward(variables, batch):
        network = merge(model._graphdef, variables)
        inputs = network_maths.prepare(network, batch, SalmModes())
        hidden = network_maths.forward(network, inputs.embeds, batch, SalmModes())
        return network.llm.logits(hidden)

    lengths = np.asarray((batch.segments > 0).sum(-1)).reshape(-1)
    logits = left_padded(np.asarray(forward(model.variables, batch)), lengths)[:, -3:]
    np.testing.assert_allclose(logits, GOLDEN["logits_last3"], atol=ACTIVATION_ATOL, rtol=0)


@pytest.mark.slow
def test_loss_and_every_gradient_equal_nemo(model, batch, gradients):
    loss, named = gradients(batch)
    assert float(loss.count) == FACTS["num_frames"]
    np.testing.assert_allclose(float(loss.mean()), FACTS["loss"], rtol=LOSS_RTOL)
    assert_gradients(named, FACTS["grad_norms"])
    for name, golden in under_golden("grad/").items():
        np.testing.assert_allclose(named[name], golden, rtol=1e-3, atol=GRADIENT_ATOL, err_msg=name)


def under_golden(prefix):
    return {n.removeprefix(prefix): v for n, v in GOLDEN.items() if n.startswith(prefix)}


def assert_gradients(named, norms):
    for name, norm in norms.items():
        got = np.linalg.norm(named[name])
        np.testing.assert_allclose(got, norm, rtol=1e-3, atol=GRADIENT_ATOL, err_msg=name)


def split_batches(model):
    """What NeMo's two processes had: conversations 0 and 2, and 1."""
    examples = golden_examples(RUN)
    longest = int(max(under(RUN, "batch")["audio_lens"]))
    shape = BatchShape(sequences=2, tokens=56, clips=2, samples=longest)
    kinds = {"frame_count": model.frame_count, "placeholder_id": model.audio_locator_tag_id}
    groups = [[examples[0], examples[2]], [examples[1]]]
    return [assemble_salm_batch([group], shape, **kinds) for group in groups], assemble_salm_batch(
        groups, shape, **kinds
    )


def test_the_loss_is_normalised_by_the_tokens_of_all_groups(model, gradients):
    """NeMo's gradient of two processes: the sum of their losses over the tokens of both."""
    _, both = split_batches(model)
    loss, named = gradients(jax.tree.map(jnp.asarray, both))
    np.testing.assert_allclose(
        float(loss.mean()), np.mean(FACTS["two_ranks"]["losses"]), rtol=LOSS_RTOL
    )
    assert_gradients(named, FACTS["two_ranks"]["grad_norms"])


@pytest.mark.slow
def test_validation_is_a_mean_over_tokens(model):
    batches, _ = split_batches(model)
    compute = jax.jit(lambda v, b: model.losses(v, b, key=None, train=False))
    sums = [compute(model.variables, batch) for batch in batches]
    for name, shares in (
        ("val_loss", [s.loss for s in sums]),
        ("val_acc", [s.metrics["acc"] for s in sums]),
    ):
        mean = sum(float(s.total) for s in shares) / sum(float(s.count) for s in shares)
        np.testing.assert_allclose(mean, FACTS["validation_of_two_batches"][name], rtol=LOSS_RTOL)


def test_nemo_exact_takes_means_of_batch_means_only_for_a_salm(model):
    exact = SALM.from_pretrained(HF)
    exact._blueprint = replace(
        exact._blueprint, config=replace(exact._blueprint.config, nemo_exact=True)
    )
    validator = make_validator(exact, TrainerConfig(max_steps=1), {}, None)
    assert exact.nemo_exact and not validator.nemo_exact


@pytest.mark.slow
def test_greedy_responses_equal_nemo(model):
    batch, tag = under(RUN, "batch"), model.audio_locator_tag
    prompts = [
        [{"role": "user", "slots": {"message": f"Repeat after me: {tag}"}}],
        [{"role": "user", "slots": {"message": f"{tag} and then {tag} ?"}}],
    ]
    ids = model.generate(prompts, batch["audios"], batch["audio_lens"], max_new_tokens=16)
    np.testing.assert_array_equal(ids, FACTS["generate"]["dicts_plus_audios"])
    texts = [[{"role": "user", "content": t}] for t in ("What time is it?", "Yes")]
    np.testing.assert_array_equal(
        model.generate(texts, max_new_tokens=16), FACTS["generate"]["text_only"]
    )


def test_trainable_parameters_are_nemos(model):
    # a stack is trained as a whole here
    names = {s.name for s in model.parameter_names if s.is_parameter and model.trainable[s.path]}
    assert names == set(FACTS["trainable"])
