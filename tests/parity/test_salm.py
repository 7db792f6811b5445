"""SALM equals NeMo 3.0.0: inputs, logits, loss, gradients, AdamW steps, accuracy, generations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from transformers import GenerationConfig

from speechlm2_jax.layers.module import merge
from speechlm2_jax.models import SALM
from speechlm2_jax.networks import salm as network_maths
from speechlm2_jax.networks.salm import SalmModes
from tests.parity.salm_golden import (
    ACTIVATION_ATOL,
    BATCH_OF,
    DATA,
    IGNORED_TARGET,
    LOSS_RTOL,
    RUNS,
    assert_first_step_equals_nemo,
    facts,
    five_steps,
    golden_batch,
    left_padded,
    make_model,
    named_values,
    tensors,
    under,
)

NOISE_GRADIENT = 5e-6
CHECKSUM_ATOL = 5e-3
"""Five steps at rate 1e-3: how far AdamW may carry an element whose gradient is rounding noise."""


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return request.param


@pytest.fixture(scope="module")
def model(run):
    return make_model(run)


@pytest.fixture(scope="module")
def batch(model, run):
    return jax.tree.map(jnp.asarray, golden_batch(model, run))


@pytest.fixture(scope="module")
def validate(model, batch):
    """The losses of the batch in evaluation, by variables: one program for all tests."""
    losses = jax.jit(lambda v: model.losses(v, batch, key=None, train=False))
    return lambda variables: losses(jax.device_get(variables))


def _lengths(batch):
    return np.asarray((batch.segments > 0).sum(-1)).reshape(-1)


def test_inputs_and_logits_equal_nemo(model, run, batch):
    @jax.jit
    def forward(variables, batch):
        network = merge(model._graphdef, variables)
        inputs = network_maths.prepare(network, batch, SalmModes())
        hidden = network_maths.forward(network, inputs.embeds, batch, SalmModes())
        return inputs.embeds, network.llm.logits(hidden)

    embeds, logits = forward(model.variables, batch)
    lengths, golden = _lengths(batch), tensors(run)
    mask = golden["eval/attention_mask"].astype(bool)
    if run not in BATCH_OF:  # the others were recorded without these tensors
        got = left_padded(np.asarray(embeds), lengths)
        np.testing.assert_allclose(
            got[mask], golden["eval/input_embeds"][mask], atol=ACTIVATION_ATOL, rtol=0
        )
        last = left_padded(np.asarray(logits), lengths)[:, -24:]
        np.testing.assert_allclose(
            last[mask[:, -24:]],
            golden["eval/logits_last24"][mask[:, -24:]],
            atol=ACTIVATION_ATOL,
            rtol=0,
        )
    targets = np.where(batch.loss_mask, batch.targets, IGNORED_TARGET)[0]
    shifted = np.full_like(targets, IGNORED_TARGET)
    for i, n in enumerate(lengths):
        shifted[i, targets.shape[1] - n :] = targets[i, :n]
    np.testing.assert_array_equal(shifted, golden["eval/target_ids"])


@pytest.mark.parametrize("saved", ["llama_adapter", "qwen3_lora"])
def test_public_forward_takes_left_padding(saved):
    model, golden = SALM.from_pretrained(DATA / f"{saved}_hf"), tensors(saved)
    mask = golden["eval/attention_mask"].astype(bool)
    logits = model(golden["eval/input_embeds"], attention_mask=mask)["logits"][:, -24:]
    np.testing.assert_allclose(
        np.asarray(logits)[mask[:, -24:]],
        golden["eval/logits_last24"][mask[:, -24:]],
        atol=ACTIVATION_ATOL,
        rtol=0,
    )


def test_validation_loss_and_accuracy_equal_nemo(model, run, validate):
    losses = validate(model.variables)
    np.testing.assert_allclose(losses.loss.mean(), facts(run)["val_loss"], rtol=LOSS_RTOL)
    np.testing.assert_allclose(losses.metrics["acc"].mean(), facts(run)["val_acc"], atol=1e-6)


def test_trainable_parameters_are_nemos(model, run):
    names = {s.name for s in model.parameter_names if s.is_parameter and _is_on(model, s)}
    assert names == set(facts(run)["trainable"])


def _is_on(model, s):
    on = model.trainable[s.path]
    return bool(on if np.ndim(on) == 0 else on[s.layer])


@pytest.fixture(scope="module")
def training(model, batch):
    """Five steps of the recorded recipe: clip at 1, AdamW, constant rate."""
    return five_steps(model, batch)


def test_training_loss_gradients_and_statistics_equal_nemo(model, run, training):
    assert_first_step_equals_nemo(model, run, training)


def test_five_adamw_steps_equal_nemo(model, run, training, validate):
    np.testing.assert_allclose(training.losses, facts(run)["train_losses"], rtol=1e-4)
    np.testing.assert_allclose(
        training.gradient_norms, facts(run)["grad_norm_before_clip"], rtol=1e-3
    )
    # The recorded `after5/*` tensors are those of step 0; the checksums are of the true end. Where
    # the gradient is rounding noise (a bias before a norm, a key bias), AdamW amplifies the noise.
    named = named_values(model, training.final)
    for name, sums in facts(run)["final_param_checksums"].items():
        if facts(run)["grad_norms"][name] > NOISE_GRADIENT:
            value = named[name].astype(np.float64)
            got = [value.sum(), np.abs(value).sum(), np.linalg.norm(value)]
            want = [sums["sum"], sums["abs_sum"], sums["l2"]]
            np.testing.assert_allclose(got, want, atol=CHECKSUM_ATOL, err_msg=name)
    for name, golden in under(run, "after5_buffers").items():
        if name.endswith("running_var"):  # the mean moves with the noisy bias before it
            np.testing.assert_allclose(named[name], golden, atol=ACTIVATION_ATOL, err_msg=name)
    losses = validate(training.final)
    np.testing.assert_allclose(losses.loss.mean(), facts(run)["val_loss_after5"], rtol=1e-4)
    np.testing.assert_allclose(
        losses.metrics["acc"].mean(), facts(run)["val_acc_after5"], atol=1e-6
    )


def _dialogs(run):
    return facts(run)["generate_prompts"]["dialog"]


def _clips(*names):
    return [soundfile.read(DATA / "audio" / f"{n}.wav", dtype="float32")[0] for n in names]


def _generations(run, model):
    """The arguments of each recorded generation, by its name."""
    asked, text = facts(run)["generate_prompts"], facts(run)["generate_text_prompts"]
    audios, lens = tensors(run)["batch/audios"], tensors(run)["batch/audio_lens"]
    new = {"max_new_tokens": 16}
    with_paths = [
        [{**turns[0], "audio": [str(DATA / "audio" / f"{n}.wav") for n in names]}]
        for turns, names in zip(asked["dialog"], (["a0"], ["a1", "a2"]), strict=True)
    ]
    resampled = [[{**asked["dialog"][0][0], "audio": [str(DATA / "audio" / "r22k.wav")]}]]
    brief = GenerationConfig(
        max_new_tokens=5,
        bos_token_id=model.text_bos_id,
        eos_token_id=model.text_eos_id,
        pad_token_id=model.text_pad_id,
    )
    return {
        "dicts_plus_audios": dict(prompts=asked["dialog"], audios=audios, audio_lens=lens, **new),
        "tokens_plus_audios": dict(
            prompts=np.array(asked["tokens"]), audios=audios, audio_lens=lens, **new
        ),
        "audio_paths_in_prompt": dict(prompts=with_paths, **new),
        "single_row0": dict(
            prompts=asked["dialog"][:1], audios=audios[:1, : lens[0]], audio_lens=lens[:1], **new
        ),
        "resampled_22050_audio_path": dict(prompts=resampled, **new),
        "text_only": dict(prompts=text["dialog"], **new),
        "with_generation_config_max_new_5": dict(
            prompts=asked["dialog"], audios=audios, audio_lens=lens, generation_config=brief
        ),
    }


@pytest.mark.parametrize("source", ["hf", "ckpt"])
@pytest.mark.parametrize("saved", ["llama_adapter", "qwen3_lora"])
def test_every_generation_equals_nemo(saved, source):
    path = DATA / (f"{saved}_hf" if source == "hf" else f"{saved}.ckpt")
    if not path.exists():
        assert (saved, source) == ("llama_adapter", "ckpt")  # the one that was not recorded
        return
    model = SALM.from_pretrained(path).eval()
    for name, asked in _generations(saved, model).items():
        np.testing.assert_array_equal(
            model.generate(**asked), facts(saved)["generate"][name], err_msg=name
        )


def test_responses_to_dialogs_of_several_turns_equal_nemo():
    """Recorded by running NeMo 3.0.0 on `llama_adapter_hf`: two and three audio turns."""
    model = SALM.from_pretrained(DATA / "llama_adapter_hf").eval()
    batch = under("llama_adapter", "batch")
    recorded = json.loads((DATA / "llama_adapter_multi_turn.json").read_text())
    for name, case in recorded.items():
        clips = case["clips"]
        response = model.generate(
            prompts=[case["dialog"]],
            audios=batch["audios"][clips],
            audio_lens=batch["audio_lens"][clips],
            max_new_tokens=16,
        )
        np.testing.assert_array_equal(response, case["answer"], err_msg=name)
