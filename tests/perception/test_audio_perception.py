"""Invariants of the whole perception module: frames from waveforms, whatever the batch."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlm2_jax.layers.module import abstract, describe, merge
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.modality_adapter import IdentityConfig, MultiLayerConfig
from speechlm2_jax.perception.perception import (
    AudioPerception,
    PerceptionConfig,
    PerceptionModes,
)
from speechlm2_jax.perception.qformer import (
    QformerConfig,
    QformerEncoderConfig,
    QformerLlmConfig,
)
from speechlm2_jax.settings import SettingsError, build, override
from speechlm2_jax.sharding import RULES
from tests.perception.small_perception import (
    ALL_DROPOUT,
    RANDOM_EVERYWHERE,
    adapter_config,
    assert_all_close,
    assert_close,
    assert_finite,
    encoder_config,
    example_rngs,
    noise,
    padded,
    perception,
    perception_config,
    quick_jit,
    run,
    select,
)

ALL_TRAINING = PerceptionModes(log_mel=True, spec_augment=True, encoder=True, adapter=True)
MULTI_LAYER = MultiLayerConfig(target_layer_ids=(-1, 0), input_dim=16, output_dim=8)
Q_FORMER = QformerConfig(
    prompt_size=3,
    target_layer_ids=(0,),
    qformer_num_hidden_layers=2,
    encoder_config=QformerEncoderConfig(d_model=16, encoder_attention_heads=2),
    llm_config=QformerLlmConfig(hidden_size=8),
)
CONFIGS = {
    "layers": perception_config(adapter=MULTI_LAYER),
    "queries": perception_config(adapter=Q_FORMER),
    "parts": perception_config(adapter=IdentityConfig(), encoder_chunk_size_seconds=0.05),
    "causal parts": perception_config(
        encoder=encoder_config(causal_downsampling=True, subsampling_factor=8),
        adapter=adapter_config(subsampling_factor=2),
        encoder_chunk_size_seconds=0.01,
        exact_pad=True,
    ),
    "identity": perception_config(adapter=IdentityConfig()),
    "projected": perception_config(adapter=IdentityConfig(d_model=16), pad_to=16),
    "halving adapter": perception_config(adapter=adapter_config(subsampling_factor=2)),
    "causal": perception_config(
        encoder=encoder_config(causal_downsampling=True, subsampling_factor=8),
        adapter=adapter_config(causal_downsampling=True, subsampling_factor=2),
        exact_pad=True,
    ),
}
BATCH = 8
MOST_SAMPLES = 30_000


@cache
def model_lengths(name):
    """Compiles lengths in samples -> the model's lengths in frames (the rest is dead code)."""
    graphdef, variables, _ = perception(CONFIGS[name])
    silence = jnp.zeros((BATCH, MOST_SAMPLES))
    return quick_jit(lambda lengths: merge(graphdef, variables)(silence, lengths).lengths)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CONFIGS)),
    st.lists(st.integers(0, MOST_SAMPLES), min_size=BATCH, max_size=BATCH),
)
def test_frame_count_is_the_models_own_length(name, samples):
    config = CONFIGS[name]
    lengths = model_lengths(name)(jnp.asarray(samples, jnp.int32))
    assert lengths.tolist() == [config.frame_count(n) for n in samples]
    longest = max(samples)
    assert config.frame_capacity(longest) >= max(config.frame_count(n) for n in samples)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_output_has_the_promised_extent_and_width(name):
    config = CONFIGS[name]
    graphdef, variables, _ = perception(config)
    audio, lengths = padded([noise(5000), noise(0)], 6400)
    frames = jax.eval_shape(lambda v: merge(graphdef, v)(audio, lengths).frames, variables)
    assert frames.shape == (2, config.frame_capacity(6400), config.output_width)
    duration = config.frame_samples / 16000
    assert config.token_equivalent_duration == pytest.approx(duration)
    subsampling = {"halving adapter": 8, "causal": 16, "causal parts": 16}.get(name, 4)
    assert config.frame_samples == 160 * subsampling


def scored(config, modes):
    """Compiles a batch -> (loss, output) and gradients; the loss covers real frames only.

    The gradients are those of adapter and projection: test_fastconformer has the encoder's.
    """
    graphdef, variables, parameters = perception(config)
    parameters = [p for p in parameters if not p.startswith("encoder.")]

    def value(chosen, audio, lengths, rngs):
        network = merge(graphdef, {**variables, **chosen})
        output = network(audio, lengths, modes=modes, rngs=rngs)
        real = jnp.arange(output.frames.shape[1])[None] < output.lengths[:, None]
        squares = jnp.where(real[..., None], jnp.square(output.frames - 1.0), 0.0)
        return jnp.sum(squares) / jnp.maximum(jnp.sum(output.lengths), 1), output

    step = quick_jit(jax.value_and_grad(value, has_aux=True))

    return lambda audio, lengths, rngs=None: step(
        select(variables, parameters), audio, lengths, rngs
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {
                "encoder": encoder_config(n_layers=1, **ALL_DROPOUT),
                "adapter": Q_FORMER,
                "encoder_chunk_size_seconds": 0.25,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["whole", "parts"],
)
def test_bucket_order_and_empty_clips_change_no_loss_no_frame_and_no_gradient(changes):
    """Everything trains and draws: statistics count real frames, each clip has its own key."""
    call = scored(perception_config(**RANDOM_EVERYWHERE | changes), ALL_TRAINING)
    clips = [noise(n, seed=n) for n in (3300, 6400)]
    (loss, a), gradients = call(*padded(clips, 6400), example_rngs(0, 1))
    (other, b), others = call(*padded([*clips[::-1], noise(0)], 9000), example_rngs(1, 0, 2))
    assert_close(other, loss)
    assert_all_close(others, gradients)
    assert_all_close(b.statistics, a.statistics)
    assert b.lengths.tolist() == [*a.lengths.tolist()[::-1], 0]
    for row, length in enumerate(a.lengths):
        assert_close(b.frames[1 - row, :length], a.frames[row, :length])
    assert_finite((b, others))


@pytest.mark.slow  # six programs; each part draws in tests of its own
def test_randomness_needs_both_a_key_and_training_mode():
    # layer norm: training mode alone changes nothing
    part = {"conv_norm_type": "layer_norm", "n_layers": 1, **ALL_DROPOUT}
    parts = {"encoder": encoder_config(**part), "adapter": adapter_config(**part)}
    config = perception_config(**{**RANDOM_EVERYWHERE, **parts})
    graphdef, variables, _ = perception(config)
    batch = padded([noise(3200)], 3200)
    plain = run(graphdef, variables, *batch, modes=ALL_TRAINING).frames
    keyed = run(graphdef, variables, *batch, rngs=example_rngs(0)).frames
    assert_close(keyed, plain)
    for name in ("log_mel", "spec_augment", "encoder", "adapter"):
        modes = PerceptionModes(**{name: True})
        moved = run(graphdef, variables, *batch, modes=modes, rngs=example_rngs(0)).frames
        assert np.abs(moved - plain).max() > 1e-3, name


def test_statistics_come_from_the_parts_in_training_under_their_own_paths():
    config = perception_config()
    graphdef, variables, _ = perception(config)
    batch = padded([noise(3200)], 3200)
    for modes, prefixes in (
        (PerceptionModes(), set()),
        (PerceptionModes(adapter=True), {"adapter"}),
        (PerceptionModes(adapter=True, encoder=True), {"adapter", "encoder"}),
    ):
        statistics = run(graphdef, variables, *batch, modes=modes).statistics
        assert {path.split(".")[0] for path in statistics} == prefixes
        for path, value in statistics.items():
            assert value.shape == variables[path].shape
            assert value.dtype == variables[path].dtype


def test_nemo_exact_counts_the_groups_padding_and_not_the_buckets():
    graphdef, variables, _ = perception(perception_config())
    clips = [noise(n, seed=n) for n in (3300, 6400)]
    training = PerceptionModes(encoder=True, adapter=True)

    def passed(clips, size, extents=None):
        modes = replace(training, nemo_exact=extents is not None)
        return run(graphdef, variables, *padded(clips, size), modes=modes, extents=extents)

    group = passed(clips, 6400, jnp.asarray([6400, 6400]))
    bucket = passed([*clips, noise(0)], 9000, jnp.asarray([6400, 6400, 6400]))
    assert_all_close(bucket.statistics, group.statistics)
    for row, length in enumerate(group.lengths):
        assert_close(bucket.frames[row, :length], group.frames[row, :length])
    real = passed(clips, 6400)
    path = "adapter.layers.conv.norm.running_mean"
    assert np.abs(real.statistics[path] - group.statistics[path]).max() > 1e-5


def test_nemo_exact_without_extents_is_an_error_that_names_them():
    graphdef, variables, _ = perception(perception_config())
    with pytest.raises(ValueError, match="extents"):
        run(
            graphdef,
            variables,
            *padded([noise(3200)], 3200),
            modes=PerceptionModes(nemo_exact=True),
        )


def test_a_batch_of_empty_clips_keeps_the_statistics_and_is_finite():
    config = perception_config()
    (loss, output), gradients = scored(config, PerceptionModes(encoder=True, adapter=True))(
        jnp.zeros((2, 3200)), jnp.asarray([0, 160], jnp.int32)
    )
    assert_finite((loss, output, gradients))
    assert output.lengths.tolist() == [0, 1]


def test_frames_have_the_compute_dtype():
    graphdef, variables, _ = perception(perception_config())
    audio, lengths = padded([noise(3200)], 3200)
    half = lambda v: merge(graphdef, v)(audio, lengths, dtype=jnp.bfloat16).frames  # noqa: E731
    assert jax.eval_shape(half, variables).dtype == jnp.bfloat16


BLOCKS = {
    "preprocessor": {"features": 12},
    "encoder": {"feat_in": 12, "n_layers": 1, "d_model": 16},
    "modality_adapter": {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": 16,
        "n_layers": 1,
        "d_model": 16,
    },
    "output_dim": 8,
}


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ("encoder", {"feat_in": 80}, "encoder.feat_in=80"),
        ("modality_adapter", {"feat_in": 32}, "modality_adapter.feat_in=32"),
        ("modality_adapter", {"feat_out": 24}, "modality_adapter.feat_out=24"),
        ("modality_adapter", {"_target_": "a.b.OtherConnector"}, "OtherConnector"),
        ("modality_adapter", {"_target_": "os.system"}, "os.system"),
        ("encoder", {"_target_": "a.b.SqueezeformerEncoder"}, "SqueezeformerEncoder"),
        ("modality_adapter", {"n_layerz": 2}, "n_layers"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_by_name(block, changes, message):
    with pytest.raises(SettingsError, match=message):
        build(PerceptionConfig, {**BLOCKS, block: {**BLOCKS[block], **changes}}, "model.perception")


def test_an_identity_connector_is_projected_if_its_width_is_given():
    def made(**block):
        target = "nemo.collections.speechlm2.modules.perception.IdentityConnector"
        adapter = {"_target_": target, **block}
        return build(PerceptionConfig, {**BLOCKS, "modality_adapter": adapter})

    assert made(d_model=16).output_width == 8
    assert made().output_width == 16
    assert made(d_model=16, output_dim=8).output_width == 16
    with pytest.raises(SettingsError, match="modality_adapter.d_model=4"):
        made(d_model=4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("MultiLayerProjectionConnector", {"input_dim": 4}, "input_dim=4 .* width 16"),
        ("MultiLayerProjectionConnector", {"target_layer_ids": [1]}, r"\[1\] .* which has 1"),
        ("MultiLayerProjectionConnector", {"target_layer_ids": [0, -1]}, "names a layer twice"),
        ("QformerConnector", {"target_layer_ids": []}, r"\[\] must name layers"),
        ("QformerConnector", {"prompt_size": 0}, "prompt_size"),
        ("QformerConnector", {"encoder_config.encoder_attention_heads": 3}, "must divide d_model"),
        ("QformerConnector", {"encoder_config.d_model": 8}, "d_model=8 .* width 16"),
    ],
)
def test_adapters_that_read_layers_are_refused_by_name_where_they_do_not_fit(
    name, changes, message
):
    blocks = {
        "MultiLayerProjectionConnector": {
            "target_layer_ids": [0],
            "input_dim": 16,
            "output_dim": 8,
        },
        "QformerConnector": {
            "prompt_size": 3,
            "target_layer_ids": [0],
            "qformer_num_hidden_layers": 1,
            "encoder_config": {"d_model": 16, "encoder_attention_heads": 2},
            "llm_config": {"hidden_size": 8},
        },
    }
    overrides = [f"{key}={value}" for key, value in changes.items()]
    adapter = override({"_target_": f"a.b.{name}", **blocks[name]}, overrides)
    with pytest.raises(SettingsError, match=message):
        build(PerceptionConfig, {**BLOCKS, "modality_adapter": adapter}, "model.perception")


def test_a_width_that_is_not_the_llms_is_refused_with_the_key_that_decides():
    for adapter, key in (
        (None, r"model\.perception\.output_dim to 5"),
        (IdentityConfig(), r"modality_adapter\.d_model \(which adds a projection\) to 16"),
        (MULTI_LAYER, r"modality_adapter\.output_dim to 5"),
        (Q_FORMER, r"modality_adapter\.llm_config\.hidden_size to 5"),
    ):
        config = perception_config(**({} if adapter is None else {"adapter": adapter}))
        config.check_width(config.output_width)
        with pytest.raises(ValueError, match=key):
            config.check_width(5)


def test_an_encoder_that_subsamples_nothing_may_say_so_with_null():
    plain = encoder_config(subsampling_factor=1)
    null = encoder_config(subsampling_factor=1, subsampling=None)
    shapes = [
        {
            p: i.shape
            for p, i in describe(abstract(lambda rngs, c=c: FastConformer(c, rngs=rngs))).items()
        }
        for c in (plain, null)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("adapter", [MULTI_LAYER, Q_FORMER])
def test_every_variable_of_an_adapter_names_an_axis_for_each_dimension(adapter):
    config = perception_config(adapter=adapter)
    infos = describe(abstract(lambda rngs: AudioPerception(config, rngs=rngs)))
    own = {path: info for path, info in infos.items() if path.startswith("adapter.")}
    assert own
    for info in own.values():
        assert len(info.axes) == len(info.shape)
        assert {a for a in info.axes if a is not None} <= {name for name, _ in RULES}
