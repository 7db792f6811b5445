"""Perception equals NeMo 3.0.0, part by part; the tensors are in tests/data/perception."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.fastconformer import fastconformer_table
from speechlm2_jax.conversion.perception import perception_table
from speechlm2_jax.conversion.readers import memory_source
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.perception import encoder_stream
from speechlm2_jax.perception.conformer_layer import ConformerLayer, LayerInputs
from speechlm2_jax.perception.encoder_plan import EncoderPlan
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.frame_mask import FrameMask, attention_mask, sinusoids
from speechlm2_jax.perception.log_mel import LogMel, LogMelConfig
from speechlm2_jax.perception.perception import (
    AudioPerception,
    PerceptionConfig,
    PerceptionModes,
)
from speechlm2_jax.perception.self_attention import relative_positions
from speechlm2_jax.settings import build
from tests.parity.sampled import assert_recorded, recorded_names
from tests.perception.small_perception import quick_jit

DATA = Path(__file__).parents[1] / "data"
FP32_ATOL = 1e-5  # one layer; also holds for these small encoders as a whole
LOSS_ATOL = 1e-6
MEL_ATOL = 2e-4  # normalised log of nearly silent bins
TABLE_ATOL = 1e-6

MEL_CONFIGS = list(json.loads((DATA / "perception/mel.json").read_text())["configs"])
ENCODERS = sorted(p.stem for p in (DATA / "perception").glob("enc_*.safetensors"))
ADAPTERS = tuple(
    name
    for name, made in json.loads((DATA / "perception/perception.json").read_text())[
        "adapters"
    ].items()
    if "modality_adapter" in made
)


@cache
def tensors(name):
    return load_file(DATA / f"{name}.safetensors")


@cache
def facts(name):
    return json.loads((DATA / f"{name}.json").read_text())


def below(values, prefix):
    return {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}


def assert_close(actual, expected, atol=FP32_ATOL):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=atol, rtol=0)


def load_weights(table, infos, state):
    """NeMo's tensors as our variables; the goldens leave out, or reshape, the batch counters."""
    state = dict(state)
    for name in mapping.names(table, infos):
        if name.name.endswith("num_batches_tracked"):
            state[name.name] = np.reshape(state.get(name.name, 0), ()).astype(np.int64)
    loaded = mapping.load(memory_source(state), table, infos)
    return {path: jnp.asarray(value) for path, value in loaded.items()}


@cache
def encoder_case(name):
    """(graphdef, variables, tensors, config, features, lengths) of an encoder golden."""
    given = tensors(f"perception/{name}")
    config = build(FastConformerConfig, facts(f"perception/{name}")["config"])
    weights = below(given, "state_dict/") or below(
        tensors("perception/enc_offline_xscale"), "state_dict/"
    )
    module = abstract(lambda rngs: FastConformer(config, rngs=rngs))
    variables = load_weights(fastconformer_table(config), describe(module), weights)
    features = jnp.asarray(given["in/audio_signal"].swapaxes(1, 2))
    lengths = jnp.asarray(given["in/length"], jnp.int32)
    return split(module)[0], variables, given, config, features, lengths


def outputs_of(given):
    return below(given, "out/") or below(given, "offline/")


@pytest.mark.parametrize("name", MEL_CONFIGS)
def test_log_mel_equals_nemo(name):
    given = tensors("perception/mel")
    made = ("n_fft_effective", "shape", "feature_lens", "any_nan", "state_dict_keys")
    block = facts("perception/mel")["configs"][name]
    config = build(LogMelConfig, {k: v for k, v in block.items() if k not in made})
    module = LogMel(config)
    clips = len(given[f"{name}/feature_lens"])
    lengths = given["audio_lens"][:clips]
    output = module(jnp.asarray(given["audio"][:clips]), jnp.asarray(lengths, jnp.int32))
    features = output.frames.swapaxes(1, 2)
    assert_recorded(features, given, f"{name}/features", atol=MEL_ATOL, rtol=0)
    assert list(features.shape) == block["shape"]
    np.testing.assert_array_equal(output.lengths, given[f"{name}/feature_lens"])
    assert [config.frame_count(int(n)) for n in lengths] == output.lengths.tolist()
    assert_close(module.window[...], given[f"{name}/window"], TABLE_ATOL)
    if recorded_names(given, f"{name}/fb"):
        assert_recorded(module.filterbank[...], given, f"{name}/fb", atol=TABLE_ATOL, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_equals_nemo_layer_by_layer(name):
    graphdef, variables, given, config, features, lengths = encoder_case(name)
    expected = outputs_of(given)
    # NeMo's stacks hold what its batch has beyond a row's length
    extents = jnp.full(lengths.shape, features.shape[1]) if config.is_stacking else None

    @quick_jit
    def run(variables):
        network = merge(graphdef, variables)
        return network.subsampling(features, lengths, extents), network(
            features, lengths, extents=extents, return_layers=True
        )

    subsampled, output = run(variables)
    assert_close(subsampled.frames, expected.get("pre_encode.0", expected.get("pre_encode")))
    np.testing.assert_array_equal(output.lengths, expected["encoded_len"])
    assert [config.frame_count(int(n)) for n in lengths] == output.lengths.tolist()
    layers = [k for k in expected if re.fullmatch(r"layer_\d+", k)]
    assert len(layers) == config.n_layers
    for layer in layers:
        assert_close(output.layers[int(layer.removeprefix("layer_"))], expected[layer])
    assert_close(output.frames.swapaxes(1, 2), expected["encoded"])


@pytest.mark.parametrize("name", ENCODERS)
def test_positions_and_masks_equal_nemo(name):
    _, _, given, config, _, _ = encoder_case(name)
    expected = outputs_of(given)
    steps = expected["encoded"].shape[2]
    made = (
        relative_positions(steps, config.d_model)
        if config.is_relative
        else sinusoids(jnp.arange(steps, dtype=jnp.float32), config.d_model)
    )
    assert_close(made, expected["pos_emb"][0])
    if "att_mask_True_is_blocked" not in expected:
        return
    lengths = jnp.asarray(expected["encoded_len"], jnp.int32)
    left, right = (jnp.full(lengths.shape, side) for side in config.contexts[0])
    frame_mask = FrameMask(positions=jnp.zeros((1, 2)), lengths=lengths, left=left, right=right)
    frames = jnp.arange(steps)[None]
    mask = attention_mask(config.att_context_style, frame_mask, frames, frames)
    np.testing.assert_array_equal(~mask, expected["att_mask_True_is_blocked"].astype(bool))


@pytest.mark.parametrize("name", ["enc_offline_xscale", "enc_ss1_adapter"])
def test_each_block_of_a_layer_equals_nemo(name):
    _, variables, given, config, _, _ = encoder_case(name)
    expected = outputs_of(given)
    parts = below(expected, "layer_0/")
    graphdef = split(abstract(lambda rngs: ConformerLayer(config, rngs=rngs)))[0]
    first = {k: v[0] for k, v in below(variables, "layers.").items()}
    layer = merge(graphdef, first)
    lengths = jnp.asarray(expected["encoded_len"], jnp.int32)
    unlimited = jnp.full(lengths.shape, -1)
    steps = parts["norm_conv"].shape[1]
    frame_mask = FrameMask(
        positions=relative_positions(steps, config.d_model),
        lengths=lengths,
        left=unlimited,
        right=unlimited,
    )
    normed = {k: jnp.asarray(v) for k, v in parts.items() if k.startswith("norm_")}
    assert_close(layer.feed_forward_in(normed["norm_feed_forward1"]), parts["feed_forward1"])
    assert_close(layer.attention(normed["norm_self_att"], frame_mask), parts["self_attn"])
    present = jnp.ones(normed["norm_conv"].shape[:2], bool)
    convolved, _ = layer.conv(
        normed["norm_conv"], LayerInputs(frame_mask=frame_mask, present=present)
    )
    assert_close(convolved, parts["conv"])
    assert_close(layer.feed_forward_out(normed["norm_feed_forward2"]), parts["feed_forward2"])


def test_a_training_pass_equals_nemo_with_its_padding_counted():
    graphdef, variables, given, config, features, lengths = encoder_case("enc_ss1_adapter")
    trained = below(given, "train/")
    weights = jnp.asarray(trained["R"].swapaxes(1, 2))
    extents = jnp.full(lengths.shape, features.shape[1])

    def loss(parameters, features):
        network = merge(graphdef, {**variables, **parameters})
        output = network(features, lengths, train=True, extents=extents)
        return jnp.mean(output.frames * weights), output

    infos = describe(abstract(lambda rngs: FastConformer(config, rngs=rngs)))
    parameters = {k: v for k, v in variables.items() if not infos[k].is_buffer}
    step = quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, output), (gradients, input_gradient) = step(parameters, features)
    assert_close(output.frames.swapaxes(1, 2), trained["encoded"])
    assert_close(value, trained["loss"][0], LOSS_ATOL)
    assert_close(input_gradient.swapaxes(1, 2), trained["grad_in"], LOSS_ATOL)
    table = fastconformer_table(config)
    expected = below(trained, "grad/")
    mine = mapping.export({**variables, **gradients}, table)
    assert {k for k in mine if "running_" not in k and "tracked" not in k} == set(expected)
    for name, gradient in expected.items():
        assert_close(mine[name], gradient, LOSS_ATOL)
    after = mapping.export({**variables, **output.statistics}, table)
    for name, statistic in below(trained, "buffer_after/").items():
        assert_close(after[name], np.reshape(statistic, after[name].shape))


@cache
def perception_case(adapter):
    blocks = facts("perception/perception")
    made = blocks["adapters"][adapter]
    config = build(
        PerceptionConfig,
        {
            "preprocessor": blocks["preprocessor"],
            "encoder": made["encoder_override"] or blocks["encoder"],
            "modality_adapter": made["modality_adapter"],
            "output_dim": blocks["output_dim"],
        },
    )
    state = below(tensors("perception/perc_identity_proj"), "state_dict/")
    if made["encoder_override"]:
        state = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    elif config.layers_read:
        state = {k.replace("encoder.", "encoder_multilayer.encoder."): v for k, v in state.items()}
    state |= below(tensors(f"perception/perc_{adapter}"), "state_dict/")
    if not config.is_projected:
        state = {k: v for k, v in state.items() if not k.startswith("proj.")}
    module = abstract(lambda rngs: AudioPerception(config, rngs=rngs))
    variables = load_weights(perception_table(config), describe(module), state)
    exported = mapping.export(variables, perception_table(config))
    assert {k: v.shape for k, v in exported.items() if "tracked" not in k} == {
        k: v.shape for k, v in state.items() if "tracked" not in k
    }
    return config, split(module)[0], variables


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_perception_equals_nemo(adapter):
    config, graphdef, variables = perception_case(adapter)
    given = below(tensors("perception/perc_identity_proj"), "in/")
    audio = jnp.asarray(given["input_signal"])
    lengths = jnp.asarray(given["input_signal_length"], jnp.int32)
    # NeMo's Q-Former reads the padding of its batch too, and gives its width for its lengths
    modes = PerceptionModes(nemo_exact=True)
    extents = jnp.full(lengths.shape, audio.shape[1])
    output = quick_jit(lambda v: merge(graphdef, v)(audio, lengths, modes=modes, extents=extents))(
        variables
    )
    expected = tensors(f"perception/perc_{adapter}")
    if adapter == "qformer":
        assert output.lengths.tolist() == [config.modality_adapter.prompt_size] * 3
    else:
        np.testing.assert_array_equal(output.lengths, expected["out/encoded_len"])
    capacity = config.frame_capacity(audio.shape[1])
    assert output.frames.shape[1] == capacity == max(output.lengths.tolist())
    assert_close(output.frames, expected["out/encoded_BTD"][:, :capacity])
    recorded = facts("perception/perception")["adapters"][adapter]
    assert config.token_equivalent_duration == pytest.approx(recorded["token_equivalent_duration"])


def test_adapter_statistics_equal_nemos_step_whatever_the_bucket():
    given = tensors("salm/llama_adapter")
    block = facts("salm/llama_adapter_hf/config")["perception"]
    config = build(PerceptionConfig, block)
    module = abstract(lambda rngs: AudioPerception(config, rngs=rngs))
    state = below(tensors("salm/llama_adapter_hf/model"), "perception.")
    table = perception_table(config)
    variables = load_weights(table, describe(module), state)
    clips, samples = given["batch/audios"].shape
    audio = jnp.pad(given["batch/audios"], ((0, 1), (0, 3200)))
    lengths = jnp.asarray([*given["batch/audio_lens"], 0], jnp.int32)
    graphdef, extents = split(module)[0], jnp.full(clips + 1, samples)
    modes = PerceptionModes(adapter=True, nemo_exact=True)
    run = quick_jit(lambda v: merge(graphdef, v)(audio, lengths, modes=modes, extents=extents))
    output = run(variables)
    after = mapping.export({**variables, **output.statistics}, table)
    expected = below(given, "buffers_after_step0/perception.")
    assert expected
    for name, statistic in expected.items():
        assert_close(after[name], np.reshape(statistic, after[name].shape))


def test_what_nemo_has_and_this_does_not_is_refused_by_name():
    block = facts("perception/enc_offline_xscale")["config"]
    for key, value in {
        "subsampling": "vggnet",
        "self_attention_model": "rel_pos_local_attn",
        "att_context_style": "chunked_limited_with_rc",
        "conv_norm_type": "instance_norm",
        "reduction": "pooling",
        "global_tokens": 2,
        "conv_context_style": "dcc",
    }.items():
        with pytest.raises(ValueError, match=key):
            build(FastConformerConfig, {**block, key: value})


@pytest.mark.parametrize("seconds", [0.2, 0.35])
def test_long_audio_in_parts_equals_nemo(seconds):
    whole, graphdef, variables = perception_case("identity_proj")
    config = replace(whole, encoder_chunk_size_seconds=seconds)
    graphdef = split(abstract(lambda rngs: AudioPerception(config, rngs=rngs)))[0]
    given = below(tensors("perception/perc_identity_proj"), "in/")
    audio = jnp.asarray(given["input_signal"])
    lengths = jnp.asarray(given["input_signal_length"], jnp.int32)
    output = quick_jit(lambda v: merge(graphdef, v)(audio, lengths))(variables)
    assert output.lengths.tolist() == [config.frame_count(int(n)) for n in lengths]
    for row, expected in tensors(f"perception/perc_chunked_{seconds}").items():
        frames = output.frames[int(row.removeprefix("row_"))]
        assert_close(frames[: len(expected)], expected)
        assert config.frame_count(int(lengths[int(row[4:])])) == len(expected)


STREAMED = [name for name in ENCODERS if "streaming" in name]


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_steps_equal_the_whole_pass_and_nemos_own(name):
    """NeMo pads its first chunk of `streaming_regular` otherwise; its whole pass is what counts."""
    graphdef, variables, given, config, features, lengths = encoder_case(name)
    left, right = config.contexts[0]
    # NeMo's schedule: one feature, and whole chunks from then on
    plan = EncoderPlan(config=config, frames=right + 1, lead=7, context=(left, right))
    assert plan.delay == 0

    @quick_jit
    def step(variables, memory, features, steps, total):
        network = merge(graphdef, variables)
        return encoder_stream.advance(network, plan, memory, features, steps, total)

    steps = facts(f"perception/{name}")["schedule"]
    end = len(steps) * plan.input_frames - plan.lead
    late = jnp.pad(
        features, ((0, 0), (plan.lead, end - features.shape[1]), (0, 0)), constant_values=2.0
    )
    memory = encoder_stream.new_state(plan, len(lengths))
    whole = given["offline/encoded"].swapaxes(1, 2)
    for number, nemo in enumerate(steps):
        first = number * plan.input_frames
        counter = jnp.full(lengths.shape, number)
        total = jnp.minimum(lengths, first + plan.input_frames - plan.lead)
        block = late[:, first : first + plan.input_frames]
        encoded, memory = step(variables, memory, block, counter, total)
        assert encoded.is_real.sum(1).tolist() == nemo["out_len"]
        place = number * plan.frames
        for row, count in enumerate(nemo["out_len"]):
            frames = encoded.frames[row, :count]
            assert_close(frames, whole[row, place : place + count])
            if config.att_context_style == "chunked_limited":
                nemos = given[f"stream/step_{number}/encoded"].swapaxes(1, 2)
                assert_close(frames, nemos[row, :count])
