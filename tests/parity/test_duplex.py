"""The duplex models compute what NeMo 3.0.0 does, stage by stage."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.layers.module import merge
from speechlm2_jax.networks import duplex
from speechlm2_jax.networks.duplex import DuplexModes
from speechlm2_jax.perception.perception import PerceptionModes
from tests.parity.duplex_golden import (
    DATA,
    MODELS,
    batch_of,
    examples,
    facts,
    golden,
    hf,
    pretrained,
    recorded_batch,
)
from tests.parity.salm_golden import five_steps, working_in
from tests.parity.sampled import assert_recorded, recorded_names

ATOL = 1e-4
EXACT = DuplexModes(perception=PerceptionModes(nemo_exact=True))


SLOW = pytest.param("duplex_s2s_speech_decoder", marks=pytest.mark.slow)
"""The guided one takes the same paths, and more."""


@pytest.fixture(scope="module", params=["duplex_s2s", "duplex_s2s_speech_decoder_cfg", SLOW])
def run(request):
    return request.param


@pytest.fixture(scope="module")
def model(run):
    return pretrained(run, nemo_exact=True)


class Stages(NamedTuple):
    """What a model makes of a recorded batch, in one program."""

    codes: Any
    inputs: Any
    losses: Any


def stages(model, name):
    @jax.jit
    def run(variables, batch):
        network = merge(model._graphdef, variables)
        return Stages(
            codes=duplex.encode_agent(network, batch),
            inputs=duplex.prepare(network, batch, EXACT),
            losses=model.losses(variables, batch, key=jax.random.key(0), train=True),
        )

    return run(model.variables, batch_of(model, examples(name)))


@pytest.fixture(scope="module")
def pair(model):
    return stages(model, "pair")


@pytest.fixture(scope="module")
def rest(model):
    return stages(model, "rest")


@pytest.fixture(scope="module")
def inputs(pair):
    return pair.inputs


def test_perception_equals_nemo(model, run):
    b, g = recorded_batch(), golden(run)
    frames, lengths = model.perception(b["source_audio"], b["source_audio_lens"])
    np.testing.assert_array_equal(lengths, g["perception/lens"])
    np.testing.assert_allclose(frames, g["perception/encoded"], atol=ATOL)


def test_perception_of_a_stream_equals_nemos_of_the_whole(model, run):
    b, g = recorded_batch(), golden(run)
    audio, lengths = b["source_audio"], b["source_audio_lens"]
    stream = model.perception_stream(batch=len(audio))
    steps = max(stream.plan.steps_for(int(n)) for n in lengths)
    pieces = []
    for first in range(0, steps * stream.plan.samples, stream.plan.samples):
        piece = audio[:, first : first + stream.plan.samples]
        piece = np.pad(piece, ((0, 0), (0, stream.plan.samples - piece.shape[1])))
        pieces.append(stream.push(piece, np.clip(lengths - first, 0, stream.plan.samples)))
    frames, is_real = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    np.testing.assert_array_equal(is_real.sum(1), g["perception/lens"])
    for row, count in enumerate(g["perception/lens"]):
        np.testing.assert_allclose(
            frames[row, is_real[row]], g["perception/encoded"][row, :count], atol=ATOL
        )


def test_codes_of_the_agent_equal_nemos(pair, run):
    g = golden(run)
    codes, lengths = pair.codes
    np.testing.assert_array_equal(lengths, g["codec/target_codes_lens"])
    np.testing.assert_array_equal(np.swapaxes(codes, 1, 2), g["codec/target_codes_BKT"])


def test_channels_and_embeddings_equal_nemos(inputs, run):
    g = golden(run)
    channels = inputs.channels
    np.testing.assert_array_equal(channels.text_targets, g["prepare_inputs/text_labels"])
    np.testing.assert_array_equal(channels.code_targets, g["prepare_inputs/audio_labels"])
    if "prepare_inputs/input_audio_tokens" in g:
        np.testing.assert_array_equal(channels.codes, g["prepare_inputs/input_audio_tokens"])
    np.testing.assert_array_equal(channels.frames, g["prepare_inputs/input_lens"])
    assert channels.is_scored.all()
    np.testing.assert_allclose(inputs.embeds, g["prepare_inputs/input_embeds"], atol=ATOL)


def test_channels_of_the_other_batch_equal_nemos(rest, run):
    channels, g = rest.inputs.channels, golden(run)
    np.testing.assert_array_equal(channels.text_targets, g["prepare_inputs_rest/text_labels"])
    np.testing.assert_array_equal(channels.code_targets, g["prepare_inputs_rest/audio_labels"])


def test_logits_equal_nemos_in_evaluation(model, inputs, run):
    g = golden(run)
    logits = model(inputs.embeds, inputs.channels.codes)
    assert_recorded(logits["text_logits"], g, "forward_eval/text_logits", atol=ATOL)
    assert_recorded(logits["audio_logits"], g, "forward_eval/audio_logits", atol=5e-4)


@pytest.mark.parametrize("name", ["pair", "rest"])
def test_losses_equal_nemos(run, name, request):
    losses = request.getfixturevalue(name).losses
    expected = facts(run)[f"loss_{name}"]
    assert losses.loss.count == expected["num_frames"]
    np.testing.assert_allclose(losses.loss.mean(), expected["loss"], rtol=1e-5)
    for metric in ("text_loss", "audio_loss"):
        np.testing.assert_allclose(losses.metrics[metric].mean(), expected[metric], rtol=1e-5)


@pytest.fixture(scope="module")
def training(model, run):
    rates = [step["lr"] for step in facts(run)["steps_adamw_clip1.0_cosine"]]
    return five_steps(model, batch_of(model, examples()), steps=5, rates=rates)


def named(model, values):
    zeros = {path: np.zeros(info.shape, np.float32) for path, info in model.infos.items()}
    return model.state_dict(zeros | values)


def test_gradients_equal_nemos(model, training, run):
    g, gradients = golden(run), named(model, training.gradients)
    norms = {n: norm for n, norm in facts(run)["grad_norms"].items() if norm is not None}
    assert set(norms) <= set(gradients)
    for name, norm in norms.items():
        own = np.linalg.norm(gradients[name])
        np.testing.assert_allclose(own, norm, rtol=1e-3, atol=1e-4, err_msg=name)
    for name in recorded_names(g, "grad/"):
        assert_recorded(gradients[name.removeprefix("grad/")], g, name, rtol=1e-3, atol=1e-3)


def test_five_steps_equal_nemos(model, training, run):
    steps, g = facts(run)["steps_adamw_clip1.0_cosine"], golden(run)
    np.testing.assert_allclose(training.losses, [s["loss"] for s in steps], rtol=1e-4)
    norms = [s["grad_norm_preclip"] for s in steps]
    np.testing.assert_allclose(training.gradient_norms, norms, rtol=1e-3)
    final = named(model, training.final)
    for name in recorded_names(g, "after5/"):
        assert_recorded(final[name.removeprefix("after5/")], g, name, atol=ATOL)


def test_what_is_frozen_is_what_nemo_freezes(model, run):
    trained = {
        s.name for s in model.parameter_names if s.is_parameter and np.any(model.trainable[s.path])
    }
    unused = {n for n in facts(run)["trainable"] if n.startswith(("embed_audio_tokens", "audio_h"))}
    if run == "duplex_s2s":
        unused = set()
    assert trained == set(facts(run)["trainable"]) - unused


def test_offline_inference_equals_nemo(model, run):
    b, g, recorded = recorded_batch(), golden(run), facts(run)["infer_pair"]
    result = model.offline_inference(b["source_audio"], b["source_audio_lens"])
    lengths = result["tokens_len"]
    np.testing.assert_array_equal(lengths, g["infer_pair/tokens_len"])
    for row, n in enumerate(lengths):
        for key in ("tokens_text", "tokens_audio"):
            np.testing.assert_array_equal(result[key][row, :n], g[f"infer_pair/{key}"][row, :n])
    assert result["text"] == recorded["text"]
    np.testing.assert_array_equal(result["audio_len"], g["infer_pair/audio_len"])
    assert_recorded(result["audio"], g, "infer_pair/audio", atol=ATOL)


def test_a_conversation_alone_gives_the_same(model, run):
    b, g = recorded_batch(), golden(run)
    for row in range(2):
        n = int(b["source_audio_lens"][row])
        alone = model.offline_inference(b["source_audio"][row : row + 1, :n], np.array([n]), False)
        assert set(alone) == {"text", "tokens_text", "tokens_audio", "tokens_len"}
        for key in ("tokens_text", "tokens_audio"):
            np.testing.assert_array_equal(alone[key], g[f"infer_pair/single{row}/{key}"])


def test_the_weight_of_the_users_channel(run):
    g = golden(run)
    if "user_weight/input_embeds" not in g:
        return
    weight = facts(run)["duplex_user_channel_weight"]
    model = pretrained(run, nemo_exact=True, duplex_user_channel_weight=weight)
    batch = batch_of(model, examples())
    embeds = jax.jit(lambda v, b: duplex.prepare(merge(model._graphdef, v), b, EXACT).embeds)(
        model.variables, batch
    )
    np.testing.assert_allclose(embeds, g["user_weight/input_embeds"], atol=ATOL)
    b = recorded_batch()
    result = model.offline_inference(b["source_audio"], b["source_audio_lens"], decode_audio=False)
    assert result["text"] == facts(run)["user_weight_infer_text"]


def test_export_is_the_inverse_of_loading(run):
    stored = load_file(hf(run) / "model.safetensors")
    exported = pretrained(run).state_dict()
    ignored = [n for n in stored if "loss_fn" in n or "causal_mask" in n or "pos_enc" in n]
    assert set(exported) == set(stored) - set(ignored)
    for name, value in exported.items():
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


def test_a_lightning_checkpoint_loads():
    with working_in(DATA):
        model = MODELS["duplex_s2s"].from_pretrained(
            DATA / "duplex_s2s" / "step2_weights_only.ckpt"
        )
    selected = load_file(DATA / "duplex_s2s" / "step2_selected.safetensors")
    state = model.state_dict()
    for name, value in selected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_a_saved_model_is_the_same_model(tmp_path, model, run):
    model.save_pretrained(tmp_path)
    again = MODELS[run].from_pretrained(tmp_path)
    for path, value in model.variables.items():
        np.testing.assert_array_equal(again.variables[path], value, err_msg=path)
    assert jnp.dtype(again.compute_dtype) == jnp.float32
