"""Invariants of the encoder: what may and what may not change a frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.fastconformer import fastconformer_table
from speechlm2_jax.layers.module import abstract, describe, merge
from speechlm2_jax.perception import self_attention
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.settings import SettingsError, build, ignored_report
from speechlm2_jax.sharding import RULES, make_sharding, place, use
from tests.perception.numpy_encoder import encode
from tests.perception.small_perception import (
    ALL_DROPOUT,
    assert_all_close,
    assert_close,
    assert_finite,
    encoder,
    encoder_config,
    example_rngs,
    noise,
    padded,
    quick_jit,
    run,
    select,
)

BF16_ATOL = 0.15  # of frames of unit size, after two layers
NEMO_KEYS = {
    "feat_in": 80,
    "n_layers": 2,
    "d_model": 16,
    "feat_out": -1,
    "causal_downsampling": False,
    "subsampling": "striding",
    "subsampling_factor": 4,
    "subsampling_conv_chunking_factor": 1,
    "subsampling_conv_channels": -1,
    "reduction": None,
    "reduction_position": None,
    "reduction_factor": 1,
    "ff_expansion_factor": 4,
    "self_attention_model": "rel_pos",
    "n_heads": 4,
    "att_context_size": None,
    "att_context_probs": None,
    "att_chunk_context_size": None,
    "att_context_style": "regular",
    "xscaling": True,
    "untie_biases": True,
    "pos_emb_max_len": 5000,
    "conv_kernel_size": 31,
    "conv_norm_type": "batch_norm",
    "conv_context_size": None,
    "conv_context_style": "regular",
    "use_bias": True,
    "dropout": 0.1,
    "dropout_pre_encoder": 0.1,
    "dropout_emb": 0.1,
    "dropout_att": 0.0,
    "stochastic_depth_drop_prob": 0.0,
    "stochastic_depth_mode": "linear",
    "stochastic_depth_start_layer": 1,
    "global_tokens": 0,
    "global_tokens_spacing": 1,
    "global_attn_separate": False,
    "use_pytorch_sdpa": False,
    "use_pytorch_sdpa_backends": None,
    "sync_max_audio_length": True,
}


def test_nemos_own_defaults_are_ours():
    with ignored_report() as report:
        config = build(FastConformerConfig, NEMO_KEYS)
    assert config == FastConformerConfig(feat_in=80, n_layers=2, d_model=16)
    assert set(report) == set(FastConformerConfig.IGNORED) - {"stochastic_depth_drop_prob"}


@pytest.mark.parametrize(
    "changes",
    [
        {"subsampling_factor": 3},
        {"subsampling": None},
        {"n_layers": 0},
        {"d_model": 0},
        {"n_heads": 0},
        {"conv_norm_type": "group_norm"},
        {"conv_norm_type": "group_norm3"},
        {"n_heads": 3},
        {"conv_kernel_size": 4},
        {"dropout": 1.5},
        {"conv_context_size": [1, 1]},
        {"conv_context_size": "sideways"},
        {"att_context_size": [3]},
        {"att_context_size": [-2, 0]},
        {"att_context_probs": [0.9], "att_context_size": [[6, 1], [6, 0]]},
        {"att_context_size": [5, 1], "att_context_style": "chunked_limited"},
        {"att_context_size": [4, -1], "att_context_style": "chunked_limited"},
        {"reduction": "striding"},
        {"feat_inn": 80},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes):
    with pytest.raises(SettingsError, match=next(iter(changes))):
        build(FastConformerConfig, {**NEMO_KEYS, **changes})


def summed(graphdef, variables, parameters, weights, **fixed):
    """Compiles (features, lengths) -> value, gradients and output of a sum over real frames."""

    def value(chosen, features, lengths):
        output = merge(graphdef, {**variables, **chosen})(features, lengths, **fixed)
        length = output.frames.shape[1]
        real = jnp.arange(length)[None] < output.lengths[:, None]
        scored = jnp.where(real[..., None], output.frames * weights[:, :length], 0.0)
        return jnp.sum(scored), output

    step = quick_jit(jax.value_and_grad(value, has_aux=True))
    return lambda *batch: step(select(variables, parameters), *batch)


DEPTHWISE = "layers.conv.depthwise"
UNCOMMON = {
    "subsampling": "stacking_norm",
    "self_attention_model": "abs_pos",
    "conv_norm_type": "group_norm4",
}


@pytest.mark.parametrize(
    ("train", "changes"),
    [
        pytest.param(False, {}, marks=pytest.mark.slow),  # its frames are compared below
        (True, {}),
        pytest.param(True, UNCOMMON, marks=pytest.mark.slow),
    ],
)
def test_padding_and_neighbours_change_no_frame_and_no_gradient(train, changes):
    """In training too: norms count real frames only. Empty and one-frame sequences stay finite."""
    config = encoder_config(att_context_size=(3, 2), **changes)
    weights = jnp.asarray(noise(2, 40, config.d_model, seed=5))
    sequences = [noise(n, config.feat_in, seed=n) for n in (21, 33)]
    (tight, a), expected = summed(*encoder(config), weights, train=train)(*padded(sequences, 33))
    none = jnp.zeros((1, 40, config.d_model))
    with_empty = summed(*encoder(config), jnp.concatenate([weights, none]), train=train)
    batch = padded([*sequences, noise(0, config.feat_in)], 60)
    (loose, b), gradients = with_empty(*batch)
    assert_close(tight, loose)
    assert_all_close(a.statistics, b.statistics)
    if train and "conv_norm_type" not in changes:
        # batch norm takes the bias away: of its gradient, 0, there is the rounding of large terms
        size = np.abs(expected[f"{DEPTHWISE}.weight"]).max()
        for found in (gradients, expected):
            assert_close(found.pop(f"{DEPTHWISE}.bias") / size, np.zeros(()))
    assert_all_close(gradients, expected)
    assert b.lengths.tolist() == [6, 9, 0]
    for row, length in enumerate(a.lengths):
        assert_close(b.frames[row, :length], a.frames[row, :length])
    with_single = with_empty(batch[0], jnp.asarray([21, 0, 1], jnp.int32))
    assert_finite(with_single)
    assert with_single[0][1].lengths.tolist() == [6, 0, 1]


def test_padding_and_neighbours_change_no_frame_in_evaluation():
    graphdef, variables, _ = encoder(encoder_config(att_context_size=(3, 2)))
    sequences = [noise(n, 12, seed=n) for n in (21, 33)]
    tight = run(graphdef, variables, *padded(sequences, 33))
    batch = padded([*sequences, noise(0, 12)], 60)
    loose = run(graphdef, variables, *batch)
    assert loose.lengths.tolist() == [6, 9, 0]
    for row, length in enumerate(tight.lengths):
        assert_close(loose.frames[row, :length], tight.frames[row, :length])
    with_single = run(graphdef, variables, batch[0], jnp.asarray([21, 0, 1], jnp.int32))
    assert_finite(with_single)
    assert with_single.lengths.tolist() == [6, 0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "subsampling": "stacking_norm",
            "subsampling_factor": 3,
            "untie_biases": False,
            "conv_norm_type": "group_norm4",
            "att_context_size": (3, 2),
        },
        {
            "subsampling": "striding",
            "self_attention_model": "abs_pos",
            "conv_norm_type": "group_norm2",
            "att_context_style": "chunked_limited",
            "att_context_size": (4, 1),
            "causal_downsampling": True,
            "conv_context_size": "causal",
            "feat_out": 6,
        },
        {
            "self_attention_model": "abs_pos",
            "causal_downsampling": True,
            "conv_context_size": (1, 3),
            "use_bias": False,
            "xscaling": False,
        },
    ],
    ids=["stacking_norm tied group_norm", "striding abs_pos chunked", "no biases, look ahead"],
)
def test_what_no_golden_covers_equals_a_reference_in_numpy(changes):
    config = encoder_config(**changes)
    graphdef, variables, _ = encoder(config)
    sequences = [noise(n, config.feat_in, seed=n) for n in (21, 34)]
    output = run(graphdef, variables, *padded(sequences, 40))
    table = fastconformer_table(config)
    weights = mapping.export(variables, table)
    weights |= {alias: weights[name] for alias, name in mapping.aliases(table).items()}
    for row, features in enumerate(sequences):
        expected = encode(config, weights, features)
        assert int(output.lengths[row]) == len(expected) == config.frame_count(len(features))
        assert_close(output.frames[row, : len(expected)], expected)


def test_counting_frames_of_padding_changes_statistics_as_told_and_not_with_the_bucket():
    graphdef, variables, _ = encoder(encoder_config())
    sequences = [noise(n, 12, seed=n) for n in (21, 33)]
    extents = jnp.asarray([33, 33])
    real = run(graphdef, variables, *padded(sequences, 33), train=True).statistics
    tight = run(graphdef, variables, *padded(sequences, 33), train=True, extents=extents).statistics
    loose = run(graphdef, variables, *padded(sequences, 60), train=True, extents=extents).statistics
    assert_all_close(tight, loose)
    name = "layers.conv.norm.running_var"
    assert np.abs(real[name] - tight[name]).max() > 1e-4
    assert run(graphdef, variables, *padded(sequences, 33)).statistics == {}


def test_a_batch_of_one_output_frame_is_finite_and_so_are_its_gradients():
    config = encoder_config(causal_downsampling=True)
    step = summed(*encoder(config), jnp.ones((3, 1, config.d_model)), train=True)
    lengths = jnp.asarray([0, 1, 1], jnp.int32)
    (value, output), gradients = step(jnp.ones((3, 1, 12)), lengths)
    assert_finite((value, output, gradients))
    assert output.frames.shape[1] == 1
    assert output.lengths.tolist() == [0, 1, 1]


STREAMING = {
    "causal_downsampling": True,
    "conv_context_size": "causal",
    "conv_norm_type": "layer_norm",
}


@pytest.mark.parametrize(
    ("style", "context", "first_changed"),
    [("regular", (5, 0), 6), ("chunked_limited", (4, 1), 6), ("chunked_limited", (6, 2), 6)],
)
def test_the_future_does_not_leak(style, context, first_changed):
    config = encoder_config(att_context_style=style, att_context_size=context, **STREAMING)
    graphdef, variables, _ = encoder(config)
    features = noise(1, 48, 12)
    changed = features.copy()
    changed[:, 25:] += 1.0  # causal subsampling by 4: input 25 first reaches frame 7
    lengths = jnp.asarray([48], jnp.int32)
    before = run(graphdef, variables, jnp.asarray(features), lengths).frames
    after = run(graphdef, variables, jnp.asarray(changed), lengths).frames
    moved = np.abs(np.asarray(after - before)).max(axis=(0, 2)) > 1e-6
    chunk = context[1] + 1
    assert first_changed == 7 // chunk * chunk or style == "regular"
    assert not moved[: 7 // chunk * chunk].any()
    assert moved[7:].all()


def test_dropout_is_drawn_from_the_key_alone():
    config = encoder_config(**ALL_DROPOUT)
    graphdef, variables, _ = encoder(config)
    row = noise(21, 12)
    first = run(graphdef, variables, *padded([row, row], 21), train=False, rngs=example_rngs(0, 1))
    second = run(graphdef, variables, *padded([row, row], 60), train=False, rngs=example_rngs(1, 0))
    length = int(first.lengths[0])
    assert_close(first.frames[0, :length], second.frames[1, :length])
    assert_close(first.frames[1, :length], second.frames[0, :length])
    assert np.abs(first.frames[0] - first.frames[1]).max() > 0.1


@pytest.mark.parametrize("place", ["dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att"])
def test_every_dropout_acts_given_rngs(place):
    config = encoder_config(n_layers=1, **{place: 0.5})
    graphdef, variables, _ = encoder(config)
    batch = padded([noise(21, 12)], 24)
    still = run(graphdef, variables, *batch)
    dropped = run(graphdef, variables, *batch, rngs=example_rngs(0))
    assert np.abs(dropped.frames - still.frames).max() > 1e-3
    assert_finite(dropped.frames)


def test_training_draws_one_of_several_contexts_and_evaluation_takes_the_first():
    contexts = ((6, 2), (6, 0))
    style = {"att_context_style": "chunked_limited", **STREAMING}
    several = encoder_config(att_context_size=contexts, att_context_probs=(0.5, 0.5), **style)
    single = [
        run(*encoder(encoder_config(att_context_size=c, **style))[:2], *padded([noise(40, 12)], 40))
        for c in contexts
    ]
    graphdef, variables, _ = encoder(several)
    batch = padded([noise(40, 12)] * 8, 40)
    assert_close(run(graphdef, variables, *batch).frames[3:4], single[0].frames)
    drawn = run(graphdef, variables, *batch, rngs=example_rngs(*range(8))).frames
    matches = np.array([[np.allclose(f, s.frames[0], atol=1e-5) for s in single] for f in drawn])
    assert (matches.sum(axis=1) == 1).all()
    assert matches.any(axis=0).all()


def test_blocks_of_queries_give_the_frames_and_gradients_of_one_block(monkeypatch):
    config = encoder_config(
        n_layers=1, att_context_size=(6, 2), att_context_style="chunked_limited", dropout_att=0.2
    )
    batch = padded([noise(n, 12, seed=n) for n in (50, 31)], 50)
    weights = jnp.asarray(noise(2, 13, config.d_model, seed=9))
    rngs = example_rngs(0, 1)
    (_, whole), expected = summed(*encoder(config), weights, rngs=rngs)(*batch)
    monkeypatch.setattr(self_attention, "BLOCK", 4)
    (_, blocks), gradients = summed(*encoder(config), weights, rngs=rngs)(*batch)
    assert_close(blocks.frames, whole.frames)
    assert_all_close(gradients, expected)


def test_the_last_layer_is_the_output_and_is_asked_for():
    graphdef, variables, _ = encoder(encoder_config())
    batch = padded([noise(21, 12)], 24)
    output = run(graphdef, variables, *batch, return_layers=True)
    assert output.layers.shape == (2, *output.frames.shape)
    assert_close(output.layers[-1], output.frames, 0.0)
    assert run(graphdef, variables, *batch).layers is None


def test_activations_keep_the_dtype_they_come_with():
    graphdef, variables, _ = encoder(encoder_config())
    features, lengths = padded([noise(40, 12)], 40)
    exact = run(graphdef, variables, features, lengths, train=True)
    half = run(graphdef, variables, features.astype(jnp.bfloat16), lengths, train=True)
    assert half.frames.dtype == jnp.bfloat16
    assert all(s.dtype != jnp.bfloat16 for s in half.statistics.values())
    assert_close(half.frames.astype(jnp.float32), exact.frames, BF16_ATOL)


def test_every_variable_names_an_axis_for_each_dimension():
    several = ({}, {"untie_biases": False, "subsampling": "striding", "feat_out": 8}, UNCOMMON)
    for changes in several:
        config = encoder_config(**changes)
        infos = describe(abstract(lambda rngs, c=config: FastConformer(c, rngs=rngs)))
        for info in infos.values():
            assert len(info.axes) == len(info.shape)
            assert {a for a in info.axes if a is not None} <= {name for name, _ in RULES}


def test_frames_and_gradients_are_the_same_on_a_mesh():
    config = encoder_config(n_layers=1)
    graphdef, variables, parameters = encoder(config)
    infos = describe(abstract(lambda rngs: FastConformer(config, rngs=rngs)))
    features, lengths = padded([noise(20 + n, 12, seed=n) for n in range(4)], 24)
    sharding = make_sharding(data=2, fsdp=2, tensor=2)

    def value(chosen, features, lengths, on):
        with use(on):
            output = merge(graphdef, {**variables, **chosen})(features, lengths, train=True)
            return jnp.mean(jnp.square(output.frames[:, :5] - 0.5)), output

    step = quick_jit(jax.value_and_grad(value, has_aux=True), static_argnums=3)
    chosen = select(variables, parameters)
    (_, alone), expected = step(chosen, features, lengths, None)
    placed = place(chosen, {k: infos[k].axes for k in chosen}, sharding)
    batch = sharding.put_batch((np.asarray(features), np.asarray(lengths)))
    (_, spread), gradients = step(placed, *batch, sharding)
    assert_close(spread.frames, alone.frames)
    assert_all_close(spread.statistics, alone.statistics)
    assert_all_close(gradients, expected)
