"""DuplexSTTModel equals NeMo 3.0.0: channels, logits, losses, gradients, generation, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.generation import forced_turns
from speechlm2_jax.generation.forced_turns import ForcedTurns
from speechlm2_jax.layers.module import merge
from speechlm2_jax.models import DuplexSTTModel
from speechlm2_jax.networks import duplex_stt
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.networks.duplex import DuplexModes
from speechlm2_jax.networks.stt_channels import ChannelShifts, shifted_text
from speechlm2_jax.perception.perception import PerceptionModes
from tests.parity.duplex_golden import DATA, recorded_batch
from tests.parity.salm_golden import five_steps, working_in
from tests.parity.stt_golden import FACTS, GOLDEN, batch_of, model_with, stored

ATOL = 1e-4
EXACT = DuplexModes(perception=PerceptionModes(nemo_exact=True))
CASES = FACTS["cases"]
IDS = TextIds(pad=0, bos=1, eos=2)


@pytest.fixture(scope="module")
def user_model():
    return model_with(nemo_exact=True, **CASES["user"]["changes"])


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def stages(case, user_model):
    """Inputs, losses and gradients of a recorded case, in one program."""
    facts = CASES[case]
    model = user_model if case == "user" else model_with(nemo_exact=True, **facts["changes"])

    @jax.jit
    def run(variables, batch):
        inputs = duplex_stt.prepare(merge(model._graphdef, variables), batch, EXACT)
        losses = model.losses(variables, batch, key=jax.random.key(0), train=True)
        return inputs, losses

    return run(model.variables, batch_of(facts))


def test_channels_equal_nemos(stages, case):
    channels, facts = stages[0].channels, CASES[case]
    width = np.array(facts["text_labels"]).shape[1]
    np.testing.assert_array_equal(channels.text_targets[:, :width], facts["text_labels"])
    assert channels.frames.tolist() == facts["input_lens"]
    assert channels.is_scored.sum(axis=1).tolist() == facts["seq_mask"]
    if "asr_labels" in facts:
        np.testing.assert_array_equal(channels.user_text_targets[:, :width], facts["asr_labels"])


def test_losses_equal_nemos(stages, case):
    losses, facts = stages[1], CASES[case]
    np.testing.assert_allclose(losses.loss.mean(), facts["loss"], rtol=1e-5)
    text = losses.metrics["text_loss"].mean()
    np.testing.assert_allclose(text, facts["audio_to_text_loss"], rtol=1e-5)
    if "asr_loss" in facts:
        theirs = losses.metrics["user_text_loss"].mean()
        np.testing.assert_allclose(theirs, facts["asr_loss"], rtol=1e-5)
    assert losses.metrics["text_acc"].mean() == facts["token_accuracy"]


@pytest.mark.parametrize("case", ["user"], indirect=True)
def test_embeddings_and_logits_equal_nemos(user_model, stages):
    width = GOLDEN["user/input_embeds"].shape[1]
    np.testing.assert_allclose(stages[0].embeds[:, :width], GOLDEN["user/input_embeds"], atol=ATOL)
    found = user_model(GOLDEN["user/input_embeds"])
    for name in ("text_logits", "asr_logits"):
        np.testing.assert_allclose(found[name], GOLDEN[f"user/{name}"], atol=ATOL)


def test_gradients_and_steps_equal_nemos(user_model):
    facts = CASES["user"]
    steps = facts["steps"]
    rates = [1e-3] * len(steps)
    training = five_steps(user_model, batch_of(facts), steps=len(steps), rates=rates)
    zeros = {path: np.zeros(info.shape, np.float32) for path, info in user_model.infos.items()}
    gradients = user_model.state_dict(zeros | training.gradients)
    for name, norm in facts["grad_norms"].items():
        own = np.linalg.norm(gradients[name])
        np.testing.assert_allclose(own, norm or 0.0, rtol=1e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(training.losses, [s["loss"] for s in steps], rtol=1e-4)
    norms = [s["norm"] for s in steps]
    np.testing.assert_allclose(training.gradient_norms, norms, rtol=1e-3)
    final = user_model.state_dict(zeros | training.final)
    for name, norm in facts["after_norms"].items():
        np.testing.assert_allclose(np.linalg.norm(final[name]), norm, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", range(len(FACTS["shifts"])))
def test_shifts_of_channels_equal_nemos(number):
    facts = FACTS["shifts"][number]
    names = {
        "advance_text_channel_by": "advance_text",
        "delay_text_channel_by": "delay_text",
        "delay_text_eos_by": "delay_eos",
        "delay_text_bos_by": "delay_bos",
        "delay_source_text_by": "delay_user_text",
    }
    shifts = ChannelShifts(**{names[key]: by for key, by in facts["changes"].items()})
    text = jnp.array(facts["target"])
    moved = shifted_text(text, jnp.full(len(text), text.shape[1]), IDS, shifts)
    width = np.array(facts["text_labels"]).shape[1]
    np.testing.assert_array_equal(moved[:, :width], facts["text_inputs"])
    np.testing.assert_array_equal(moved[:, 1 : width + 1], facts["text_labels"])


@pytest.mark.parametrize("facts", FACTS["turns"], ids=["windows", "older tokens", "defaults"])
def test_forced_turns_equal_nemos(facts):
    settings = facts["settings"]
    rule = ForcedTurns(
        user_starts=(1, 7) if "user_bos_token" in settings else (1,),
        user_ends=(2, 8) if "user_eos_token" in settings else (2,),
        threshold_frames=settings.get("force_turn_taking_threshold", 40),
        pad_window_frames=settings.get("force_turn_taking_pad_window", 25),
    )
    proposed, user = jnp.array(facts["proposed"]), jnp.array(facts["user"])
    prompts = jnp.array(facts["prompts"])

    def step(history, t):
        forced = forced_turns.force(rule, history, proposed[:, t], user[:, t], t, IDS)
        text = jnp.where((t < prompts) | (t == 0), proposed[:, t], forced)
        return forced_turns.remember(history, text, user[:, t], t, IDS), text

    _, text = jax.lax.scan(step, forced_turns.no_turns(len(user)), jnp.arange(user.shape[1]))
    np.testing.assert_array_equal(text.T, facts["text"])
    assert (proposed != text.T).any()


@pytest.mark.parametrize("name", list(FACTS["inference"]))
def test_offline_inference_equals_nemo(name):
    facts, b = FACTS["inference"][name], recorded_batch()
    model, expected = model_with(**facts["changes"]), facts["result"]
    prompts = {}
    if facts["prompts"]:
        lengths = np.array([len(p) for p in facts["prompts"]])
        tokens = [np.pad(p, (0, max(lengths) - len(p))) for p in facts["prompts"]]
        prompts = {"prompt_tokens": np.array(tokens), "prompt_token_lens": lengths}
    result = model.offline_inference(b["source_audio"], b["source_audio_lens"], **prompts)
    assert result["tokens_len"].tolist() == expected["tokens_len"]
    for row, n in enumerate(expected["tokens_len"]):
        for key in ("tokens_text", "tokens_text_src"):
            if key in expected:
                assert result[key][row, :n].tolist() == expected[key][row][:n]
    assert result["text"][0] == expected["text"][0]
    if "src_text" in expected:
        # NeMo's goes on in the padding, which a shorter prompt leaves
        assert expected["src_text"][0].startswith(result["src_text"][0])
        assert prompts or expected["src_text"][0] == result["src_text"][0]


def test_names_and_files_are_nemos(user_model, tmp_path):
    weights = stored(True)
    assert set(user_model.state_dict()) == set(weights)
    for name, value in user_model.state_dict().items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    assert set(FACTS["state_dict"]) == {s.name for s in user_model.parameter_names}
    user_model.save_pretrained(tmp_path)
    again = DuplexSTTModel.from_pretrained(tmp_path)
    for path, value in user_model.variables.items():
        np.testing.assert_array_equal(again.variables[path], value, err_msg=path)


def test_the_users_channel_starts_as_a_copy_of_the_llms_ends():
    with working_in(DATA):
        model = model_with(predict_user_text=True)
        model._variables = None
        state = model.state_dict()
    np.testing.assert_array_equal(state["asr_head.weight"], state["lm_head.weight"])
    np.testing.assert_array_equal(state["embed_asr_tokens.weight"], state["embed_tokens.weight"])
