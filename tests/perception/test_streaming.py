"""A stream, step by step, equals one pass over the whole clip."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.layers.module import merge
from speechlm2_jax.perception.modality_adapter import IdentityConfig, MultiLayerConfig
from speechlm2_jax.perception.streaming import (
    StreamPlan,
    advance,
    make_step,
    natural_frames,
    restart,
    start_stream,
)
from tests.perception.small_perception import (
    adapter_config,
    assert_close,
    encoder_config,
    noise,
    padded,
    perception,
    perception_config,
    run,
)
from tests.perception.test_audio_perception import Q_FORMER

CAUSAL = {"causal_downsampling": True, "conv_context_size": "causal"}
CHUNKED = {"att_context_style": "chunked_limited", **CAUSAL}
LAYER_NORM = {"conv_norm_type": "layer_norm"}
CASES = {
    "chunks": StreamPlan(
        config=perception_config(
            encoder=encoder_config(
                att_context_size=((6, 2), (4, 1)), subsampling_factor=8, **CHUNKED, **LAYER_NORM
            ),
            adapter=adapter_config(att_context_size=(2, 1), **CHUNKED),
            normalize="NA",
        ),
        frames=2,
        context=(4, 1),
    ),
    "one frame, looking ahead everywhere": StreamPlan(
        config=perception_config(
            encoder=encoder_config(
                att_context_size=(3, 1), subsampling="striding", untie_biases=False
            ),
            adapter=adapter_config(
                att_context_size=(4, 1),
                att_context_style="chunked_limited",
                self_attention_model="abs_pos",
            ),
            normalize=None,
            exact_pad=True,
        ),
        frames=1,
    ),
    "stacks, layers, no bound to the left": StreamPlan(
        config=perception_config(
            encoder=encoder_config(
                att_context_size=(-1, 0),
                subsampling="stacking",
                conv_context_size="causal",
                feat_out=6,
            ),
            adapter=MultiLayerConfig(target_layer_ids=(0, -1), input_dim=6, output_dim=8),
            normalize="NA",
            preemph=None,
        ),
        frames=3,
        longest=30,
    ),
}
SAMPLES = (6000, 3333, 0, 161)


@cache
def clips():
    return [noise(n, seed=n) for n in SAMPLES]


def streamed(plan, step, variables, stream, steps):
    """Runs `steps` steps; returns frames [B, T, W] and which are real [B, T]."""
    audio, lengths = padded(clips(), steps * plan.samples)
    outputs = []
    for s in range(steps):
        first = s * plan.samples
        new = jnp.clip(lengths - first, 0, plan.samples)
        output, stream = step(variables, stream, audio[:, first : first + plan.samples], new)
        outputs.append(output)
    return *(
        np.concatenate([np.asarray(getattr(h, name)) for h in outputs], axis=1)
        for name in ("frames", "is_real")
    ), stream


@pytest.mark.parametrize("name", CASES)
def test_a_stream_equals_one_pass_and_restarts(name):
    plan = CASES[name]
    graphdef, variables, _ = perception(plan.config)
    context = plan.context or plan.config.encoder.att_context_size
    encoder = replace(plan.config.encoder, att_context_size=context)
    whole = replace(plan.config, encoder=encoder)
    expected = run(perception(whole)[0], variables, *padded(clips(), max(SAMPLES)))
    step = make_step(graphdef, plan)
    steps = max(plan.steps_for(n) for n in SAMPLES)
    begun = start_stream(plan, len(SAMPLES))
    frames, is_real, stream = streamed(plan, step, variables, begun, steps)
    assert all(x.is_deleted() for x in jax.tree.leaves(begun) if x.size), "not updated in place"
    for row, samples in enumerate(SAMPLES):
        count = plan.config.frame_count(samples)
        assert int(expected.lengths[row]) == count == is_real[row].sum()
        assert_close(frames[row, is_real[row]], expected.frames[row, :count])
        for done in range(steps + 1):
            out = is_real[row, : done * plan.frames].sum()
            assert out == plan.frames_out(done, samples)
        assert plan.frames_out(plan.steps_for(samples), samples) == count
    stream = restart(stream, jnp.asarray([True, False, False, False]))
    again, real_again, _ = streamed(plan, step, variables, stream, steps)
    assert_close(again[0][real_again[0]], frames[0][is_real[0]], 0.0)
    assert not real_again[1].any()
    assert step._cache_size() == 1


def test_a_natural_step_is_whole_chunks_without_delay():
    plan = CASES["chunks"]
    assert natural_frames(plan.config, (4, 1)) == plan.frames == 2
    assert natural_frames(plan.config) == 6  # chunks of three in the encoder, of two behind it
    assert plan.delay == 0 and plan.steps_for(6000) == -(-plan.config.frame_count(6000) // 2)
    ahead = CASES["one frame, looking ahead everywhere"]
    # per layer one frame of attention and two of convolution, and a step of features
    assert ahead.delay == 3 * 3 + 1
    halving = adapter_config(subsampling_factor=2, att_context_size=(3, 0), **CAUSAL)
    config = replace(plan.config, modality_adapter=halving)
    assert natural_frames(config) == 3
    assert natural_frames(config, (4, 1)) == 1


def test_a_step_has_the_compute_dtype():
    plan = CASES["chunks"]
    graphdef, variables, _ = perception(plan.config)
    stream = start_stream(plan, 1, jnp.bfloat16)

    def step(variables, stream, audio):
        output, stream = advance(merge(graphdef, variables), plan, stream, audio)
        return output.frames, stream

    frames, after = jax.eval_shape(step, variables, stream, jnp.zeros((1, plan.samples)))
    assert frames.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), stream
    )


IDENTITY = {"adapter": IdentityConfig(), "normalize": "NA"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize": "per_feature"}, "normalize=per_feature .* NA"),
        ({"encoder": encoder_config()}, r"\[-1, -1\]: a stream needs a bounded right"),
        ({"encoder": encoder_config(att_context_size=(-1, 0))}, "bounded left .* `longest`"),
        (
            {"encoder": encoder_config(att_context_size=(3, 0), conv_norm_type="group_norm4")},
            "group norm .* layer_norm",
        ),
        ({"adapter": Q_FORMER}, "Q-Former"),
        ({"encoder_chunk_size_seconds": 1.0}, "encoder_chunk_size_seconds"),
        (
            {"adapter": MultiLayerConfig(target_layer_ids=(0,), input_dim=16, output_dim=8)},
            "look ahead",
        ),
    ],
)
def test_settings_that_cannot_stream_are_errors_that_name_them(changes, message):
    base = {**IDENTITY, "encoder": encoder_config(att_context_size=(3, 0)), **changes}
    with pytest.raises(ValueError, match=message):
        StreamPlan(config=perception_config(**base), frames=1)
