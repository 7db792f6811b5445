"""SALMWithAsrDecoder equals NeMo 3.0.0: transcripts, logits, loss, gradients, responses, files."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import speechlm2_jax as slm
from speechlm2_jax.batches import BatchShape, HostBatch, assemble_salm_batch
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.readers import memory_source, open_weights
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.salm_evaluation import model_class
from speechlm2_jax.inference.log_likelihood import response_losses
from speechlm2_jax.layers.module import merge
from speechlm2_jax.models import SALMWithAsrDecoder
from speechlm2_jax.networks import salm as network_maths
from speechlm2_jax.networks.salm import SalmModes
from speechlm2_jax.networks.transcripts import Transcripts
from speechlm2_jax.parameter_paths import PatternError
from speechlm2_jax.pretrained import registry
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import make_sharding, place
from speechlm2_jax.training.optimizer import Optimizer, read_optimizer
from speechlm2_jax.training.programs import Programs
from speechlm2_jax.training.state import Partition, TrainState, first_state, plan_layout, put
from speechlm2_jax.training.step import StepFunctions
from tests.parity.salm_golden import (
    ACTIVATION_ATOL,
    DATA,
    GRADIENT_ATOL,
    LOSS_RTOL,
    golden_batch,
    golden_examples,
    left_padded,
    under,
    working_in,
)

FACTS = json.loads((DATA / "asr_decoder.json").read_text())
GOLDEN = load_file(DATA / "asr_decoder.safetensors")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("multilayer", "hybrid")]
KINDS = ["rnnt", *SLOW]
"""RNN-T; TDT with an adapter that reads encoder layers; a hybrid model's RNN-T."""
RUN = "llama_adapter"
"""The SALM whose batch was used."""


def make(kind: str, **changes) -> SALMWithAsrDecoder:
    with working_in(DATA):
        model = SALMWithAsrDecoder({**FACTS[kind]["cfg_in"], **changes})
        prefix = f"{kind}/init/"
        own = {n.removeprefix(prefix): v for n, v in GOLDEN.items() if n.startswith(prefix)}
        rules = tuple(rule for rule in model._blueprint.table.rules if rule.source in own)
        infos = {rule.target: model.infos[rule.target] for rule in rules}
        model.variables |= mapping.load(memory_source(own), mapping.Table(rules), infos)
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return make(kind)


@pytest.fixture(scope="module")
def batch(model):
    return HostBatch(arrays=golden_batch(model, RUN, extra_tokens=8), ids=(), bucket="golden")


@pytest.fixture(scope="module")
def completed(model, batch):
    arrays = jax.tree.map(jnp.asarray, batch.arrays)
    derive = jax.jit(lambda v, b: model.derive(v, b, key=None, train=False))
    found = jax.device_get(derive(model.variables, arrays))
    return model.complete(batch, found, multiple=1).arrays


def test_names_of_all_tensors_are_nemos(model, kind):
    names = {s.name for s in model.parameter_names if s.name.startswith("perception")}
    assert names == set(FACTS[kind]["state_dict"])
    saved = {n for n in model.state_dict() if n.startswith("perception")}
    assert saved == set(FACTS[kind]["saved"])


def test_transcripts_equal_nemos(model, kind):
    clips = [clip for example in golden_examples(RUN) for clip in example.audio]
    assert model.asr_transcribe(clips) == FACTS[kind]["transcripts"]
    tokens = model._engine().transcripts(clips)
    assert [ids.tolist() for ids in tokens] == FACTS[kind]["inserted"]


def test_transcripts_follow_the_clips_of_a_batch(model, kind, completed):
    lengths = (completed.segments[0] > 0).sum(axis=-1)
    assert lengths.tolist() == FACTS[kind]["lengths"]
    first = [token for ids in FACTS[kind]["inserted"][:1] for token in ids]
    row = completed.tokens[0, 0]
    end = int(np.flatnonzero(completed.audio_index[0, 0] >= 0)[-1])
    assert row[end + 1 : end + 1 + len(first)].tolist() == first


def test_loss_equals_nemo(model, kind, completed):
    loss = jax.jit(lambda v, b: model.losses(v, b, key=None, train=False))(
        model.variables, jax.tree.map(jnp.asarray, completed)
    ).loss
    assert float(loss.count) == FACTS[kind]["num_frames"]
    np.testing.assert_allclose(float(loss.mean()), FACTS[kind]["val_loss"], rtol=LOSS_RTOL)


def test_perplexity_is_that_of_nemos_loss(model, kind):
    found = response_losses(model.engine(), golden_examples(RUN))
    assert sum(one.tokens for one in found) == FACTS[kind]["num_frames"]
    mean = sum(one.nll for one in found) / sum(one.tokens for one in found)
    np.testing.assert_allclose(mean, FACTS[kind]["val_loss"], rtol=LOSS_RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rnnt"], indirect=True)  # recorded for one model
def test_logits_equal_nemo(model, completed):
    @jax.jit
    def forward(variables, batch):
        network = merge(model._graphdef, variables)
        inputs = network_maths.prepare(network, batch, SalmModes())
        hidden = network_maths.forward(network, inputs.embeds, batch, SalmModes())
        return network.llm.logits(hidden)

    lengths = (completed.segments[0] > 0).sum(axis=-1)
    logits = forward(model.variables, jax.tree.map(jnp.asarray, completed))
    got = left_padded(np.asarray(logits), lengths)[:, -3:]
    np.testing.assert_allclose(got, GOLDEN["rnnt/logits_last3"], atol=ACTIVATION_ATOL, rtol=0)


@pytest.mark.slow
def test_gradients_equal_nemo(kind, completed):
    """Of everything but the LLM, in evaluation mode; nothing reaches the transducer's decoder."""
    cfg = FACTS[kind]["cfg_in"]
    model = make(kind, freeze_params=cfg["freeze_params"][:2])
    on = {path for path, value in model.trainable.items() if np.any(value)}
    trained = {p: v for p, v in model.variables.items() if p in on}

    def loss(trained, batch):
        variables = {**model.variables, **trained}
        return model.losses(variables, batch, key=None, train=False).loss.mean()

    arrays = jax.tree.map(jnp.asarray, completed)
    grads = jax.device_get(jax.jit(jax.grad(loss))(trained, arrays))
    zeros = {p: np.zeros(i.shape, np.float32) for p, i in model.infos.items()}
    named = model.state_dict(zeros | grads)
    for name, norm in FACTS[kind]["grad_norms"].items():
        got = np.linalg.norm(named[name])
        np.testing.assert_allclose(got, norm, rtol=1e-3, atol=GRADIENT_ATOL, err_msg=name)
    names = {s.name for s in model.parameter_names if s.path in on}
    assert not names & set(FACTS[kind]["without_gradient"])


def programs(model, *, clip_norm=1.0, **mesh) -> tuple[Programs, TrainState, dict]:
    """The trainer's own programs on a mesh, by default one device, and a first state."""
    sharding = make_sharding(**mesh, devices=None if mesh else jax.devices()[:1])
    partition = Partition.of(model.infos, model.trainable)
    config = read_optimizer(model.optimizer)
    optimizer = Optimizer(transform=config.transform(), clip_norm=clip_norm, masks=partition.masks)
    functions = StepFunctions(
        losses=model.losses, optimizer=optimizer, sharding=sharding, seed=0, derive=model.derive
    )
    layout = plan_layout(model.infos, partition, optimizer, sharding, jnp.float32)
    values = {p: np.asarray(v) for p, v in model.variables.items()}
    made = Programs(functions, layout, complete=model.complete)
    return made, first_state(values, layout, optimizer), put(values, layout.frozen, copy=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drop", "fact"), [(0.0, "train_loss"), (1.0, "train_loss_without_transcripts")]
)
def test_a_training_step_has_nemos_loss(kind, batch, drop, fact):
    model = make(kind, asr_transcript_drop_prob=drop)
    run, state, frozen = programs(model)
    validation = run.evaluate(state, frozen, batch)
    np.testing.assert_allclose(
        float(validation["loss"].mean()), FACTS[kind]["val_loss"], rtol=LOSS_RTOL
    )
    before = {path: np.asarray(value) for path, value in state.trainable.items()}
    state, report = run.train(state, frozen, batch, 1e-3)
    np.testing.assert_allclose(float(report.loss), FACTS[kind][fact], rtol=LOSS_RTOL)
    changed = {p for p, v in state.trainable.items() if np.any(np.asarray(v) != before[p])}
    assert changed == set(before) and changed
    if drop == 0:
        named = {s.name for s in model.parameter_names if s.path in changed}
        assert named == set(FACTS[kind]["train_grad_norms"])


@pytest.mark.slow
def test_four_steps_equal_nemo(kind, batch):
    """All but the LLM is trained, so transcripts change; they come from batches in training."""
    cfg = FACTS[kind]["cfg_in"]
    model = make(kind, freeze_params=cfg["freeze_params"][:2], nemo_exact=True)
    run, state, frozen = programs(model, clip_norm=0.0)
    losses, texts = [], []
    for _ in FACTS[kind]["losses_of_steps"]:
        found = derived(run, state, frozen, batch)
        to_text = model._blueprint.asr.to_text
        pairs = zip(found.labels[0], found.lengths[0], strict=True)
        texts.append([to_text(labels[:count].tolist()) for labels, count in pairs])
        state, report = run.train(state, frozen, batch, 1e-3)
        losses.append(float(report.loss))
    assert texts == FACTS[kind]["transcripts_of_steps"]
    np.testing.assert_allclose(losses, FACTS[kind]["losses_of_steps"], rtol=LOSS_RTOL)


def derived(run: Programs, state, frozen, batch) -> Transcripts:
    """The transcripts of a batch in training."""
    return jax.device_get(run._derive["training"](state, frozen, run.put(batch), np.int32(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        dict(data=2, fsdp=2, tensor=2),
        dict(fsdp=2, tensor=2, context=2, sequence_parallel=True),
    ],
)
def test_eight_devices_equal_one(mesh):
    examples = golden_examples(RUN)
    model = make("rnnt")
    groups = make_sharding(**mesh).data_parallel_size
    shape = BatchShape(sequences=2, tokens=80, clips=3, samples=max_samples(examples))
    losses, of_groups = {}, {1: [examples], groups: [examples[g::groups] for g in range(groups)]}
    for count, own in of_groups.items():
        arrays = assemble_salm_batch(
            own,
            shape if count > 1 else replace(shape, sequences=len(examples)),
            frame_count=model.frame_count,
            placeholder_id=model.audio_locator_tag_id,
        )
        run, state, frozen = programs(model, **(mesh if count > 1 else {}))
        given = HostBatch(arrays=arrays, ids=(), bucket="")
        losses[count] = []
        for _ in range(2):
            state, report = run.train(state, frozen, given, 1e-3)
            losses[count].append(float(report.loss))
    np.testing.assert_allclose(losses[groups], losses[1], rtol=LOSS_RTOL)
    alone = model.answer(examples, 8)
    axes = {path: info.axes for path, info in model.infos.items()}
    model.variables = place(model.variables, axes, make_sharding(**mesh))
    np.testing.assert_array_equal(model.answer(examples, 8), alone)


def max_samples(examples) -> int:
    return max(len(clip) for example in examples for clip in example.audio)


TAG = "<|audioplaceholder|>"
PROMPTS = [
    [{"role": "user", "slots": {"message": f"Repeat after me: {TAG}"}}],
    [{"role": "user", "slots": {"message": f"{TAG} and then {TAG} ?"}}],
]


@pytest.mark.slow
def test_responses_equal_nemo(model, kind):
    recorded = under(RUN, "batch")
    ids = model.generate(PROMPTS, recorded["audios"], recorded["audio_lens"], max_new_tokens=12)
    np.testing.assert_array_equal(ids, FACTS[kind]["generate"])
    audio = [c for e in golden_examples(RUN)[:2] for c in e.audio]
    dialogs = [
        [{**PROMPTS[0][0], "audio": audio[:1]}],
        [{**PROMPTS[1][0], "audio": audio[1:]}],
    ]
    finished = dict(f for many in model.generate_each(dialogs, max_new_tokens=12) for f in many)
    for number, expected in enumerate(FACTS[kind]["generate"]):
        np.testing.assert_array_equal(finished[number], expected[: len(finished[number])])


def test_a_saved_directory_needs_no_nemo_file(model, kind, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_asr"] == FACTS[kind]["cfg_in"]["pretrained_asr"]
    assert config["perception"]["asr"]["target"].endswith("Model")
    found = registry.identify(tmp_path)
    assert found is not None and found.classes == ("SALMWithAsrDecoder",)
    with pytest.raises(SettingsError, match="SALMWithAsrDecoder"):
        slm.models.SALM.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: automatic-speech-recognition" in card
    assert "models import SALMWithAsrDecoder" in card and "`pretrained_asr` names exists" in card
    evaluated = EvalConfig(pretrained_name=str(tmp_path), inputs="test.jsonl")
    assert model_class(evaluated) is SALMWithAsrDecoder
    assert model_class(replace(evaluated, use_asr_decoder=False)) is slm.models.SALM
    again = SALMWithAsrDecoder.from_pretrained(tmp_path)
    assert again.variables.keys() == model.variables.keys()
    for path, value in model.variables.items():
        np.testing.assert_array_equal(again.variables[path], value)
    clips = [clip for example in golden_examples(RUN) for clip in example.audio]
    assert again.asr_transcribe(clips) == FACTS[kind]["transcripts"]
    stored = open_weights(tmp_path)
    names = {n for n in (*stored.infos, *stored.aliases) if n.startswith("perception")}
    assert names == set(FACTS[kind]["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid"], indirect=True)  # its encoder is causal
def test_a_stream_has_the_frames_of_perception(model):
    audio = np.random.default_rng(0).normal(size=(1, 16000)).astype(np.float32) / 10
    frames, _ = model.perception(audio, np.array([16000]))
    stream = model.perception_stream(context=(70, 1))
    got = []
    for first in range(0, 16000 - stream.plan.samples, stream.plan.samples):
        piece, is_real = stream.push(audio[:, first : first + stream.plan.samples])
        got.append(piece[0, is_real[0]])
    got = np.concatenate(got)
    assert len(got) > 5
    np.testing.assert_allclose(got, frames[0, : len(got)], atol=ACTIVATION_ATOL)


def test_patterns_of_nemos_yaml_freeze_the_asr_model():
    """NeMo's names have no perception.encoder, so that there they freeze nothing."""
    patterns = ["^llm\\..+$", "^embed_tokens\\..+$"]
    speech = ["^perception\\.preprocessor\\..+$", "^perception\\.encoder\\..+$"]
    model = make("rnnt", freeze_params=[*patterns, *speech])
    on = {path.split(".")[1] for path, value in model.trainable.items() if np.any(value)}
    assert on == {"projection"}
    with pytest.raises(PatternError, match="perception.asr"):
        make("rnnt", freeze_params=["^perception\\.asr\\.nothing"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pretrained_asr": "asr.nemo"}, "has no transducer decoder"),
        ({"pretrained_asr": None}, "pretrained_asr: name the .nemo file"),
        ({"encoder_chunk_size_seconds": 30.0}, "encoder_chunk_size_seconds=30.0 is not supported"),
        ({"use_nemo_automodel": True}, "use_nemo_automodel=True is not supported"),
        ({"asr_transcript_drop_prob": 2.0}, r"must be in \[0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, match):
    with working_in(DATA), pytest.raises(SettingsError, match=match):
        SALMWithAsrDecoder({**FACTS["rnnt"]["cfg_in"], **change})


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("rnnt", {"encoder": {"n_layers": 5}}, r"perception\.encoder\.n_layers=5: .* leave it out"),
        ("multilayer", {"include_final_output": False}, "include_final_output=False is not supp"),
    ],
)
def test_perception_is_that_of_the_asr_model(kind, change, match):
    cfg = FACTS[kind]["cfg_in"]
    block = cfg["perception"]
    if "encoder" not in change:
        change = {"modality_adapter": {**block["modality_adapter"], **change}}
    with working_in(DATA), pytest.raises(SettingsError, match=match):
        SALMWithAsrDecoder({**cfg, "perception": {**block, **change}})
