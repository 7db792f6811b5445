"""The public codecs in their full size, with random weights: they build, run, and stream."""

import numpy as np
import pytest

from speechlm2_jax.models import AudioCodec

MODULES = "nemo.collections.tts.modules.audio_codec_modules"
MILLION = 1e6
STREAM_ATOL = 2e-5
"""Sums of up to 864 x 7 products in fp32, in another order, of audio within [-1, 1]."""
ENCODER_GAIN = 1.4
"""A leaky ReLU halves what it is given, and equal frames would have equal codes."""

LOW_FRAME_RATE = {
    "samples_per_frame": 1024,
    "audio_encoder": {
        "_target_": f"{MODULES}.HiFiGANEncoder",
        "down_sample_rates": [2, 2, 4, 8, 8],
        "encoded_dim": 32,
        "base_channels": 48,
        "activation": "lrelu",
        "resblock_dilation_sizes": [1],
    },
    "audio_decoder": {
        "_target_": f"{MODULES}.HiFiGANDecoder",
        "up_sample_rates": [8, 8, 4, 2, 2],
        "input_dim": 32,
        "base_channels": 1024,
        "activation": "lrelu",
        "output_activation": "tanh",
    },
    "vector_quantizer": {
        "_target_": f"{MODULES}.GroupFiniteScalarQuantizer",
        "num_groups": 8,
        "num_levels_per_group": [8, 7, 6, 6],
    },
}


def nano(groups, levels):
    """A nano codec of 12.5 frames per second."""
    width = groups * len(levels)
    return {
        "samples_per_frame": 1764,
        "audio_encoder": {
            "_target_": f"{MODULES}.HiFiGANEncoder",
            "down_sample_rates": [2, 3, 6, 7, 7],
            "encoded_dim": width,
            "base_channels": 24,
            "activation": "lrelu",
            "pad_mode": "replicate",
        },
        "audio_decoder": {
            "_target_": f"{MODULES}.CausalHiFiGANDecoder",
            "up_sample_rates": [7, 7, 6, 3, 2],
            "input_dim": width,
            "base_channels": 864,
            "activation": "half_snake",
            "output_activation": "clamp",
            "pad_mode": "zeros",
            "n_groups_equal_to_out_channels": True,
        },
        "vector_quantizer": {
            "_target_": f"{MODULES}.GroupFiniteScalarQuantizer",
            "num_groups": groups,
            "num_levels_per_group": levels,
        },
    }


# config, codebooks, size of each, million parameters (the cards', and those of ports of them)
CODECS = {
    "low-frame-rate 8x2016": (LOW_FRAME_RATE, 8, 2016, 112.7),
    "nano 4x4032": (nano(4, [9, 8, 8, 7]), 4, 4032, 61.8),
    "nano 13x2016": (nano(13, [8, 7, 6, 6]), 13, 2016, 62.0),
}
CAUSAL = [name for name in CODECS if name.startswith("nano")]


def made(name):
    """The codec with weights that keep signals at their size."""
    codec = AudioCodec({"sample_rate": 22050, **CODECS[name][0]})
    random, values = np.random.default_rng(0), {}
    levels = np.array(codec.config.vector_quantizer.levels, np.int32)
    for path, info in codec.infos.items():
        kind = path.rpartition(".")[2]
        if kind == "direction":
            fan_in = info.shape[1] * info.shape[2]
            drawn = random.standard_normal(info.shape, np.float32) / np.sqrt(fan_in, dtype="f4")
            values[path] = drawn
            gain = np.sqrt(np.square(drawn).sum(axis=(1, 2)))
            if path.startswith("encoder."):
                gain *= ENCODER_GAIN
            values[path.replace("direction", "gain")] = gain
        elif kind == "levels":
            values[path] = np.broadcast_to(levels, info.shape)
        elif kind == "bases":
            values[path] = np.broadcast_to(np.cumprod([1, *levels[:-1]]).astype("i4"), info.shape)
        elif kind == "alpha":
            values[path] = np.ones(info.shape, np.float32)
        elif kind == "bias":
            values[path] = random.normal(0, 0.05, info.shape).astype(np.float32)
    assert set(values) == set(codec.infos)
    codec.variables = values
    return codec


@pytest.mark.parametrize("name", [*CODECS][:2])
def test_parameters_are_those_of_the_published_codec(name):
    _, codebooks, size, millions = CODECS[name]
    codec = AudioCodec({"sample_rate": 22050, **CODECS[name][0]})
    count = sum(np.prod(i.shape) for i in codec.infos.values() if not i.is_buffer)
    assert (codec.num_codebooks, codec.codebook_size) == (codebooks, size)
    assert count / MILLION == pytest.approx(millions, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_a_full_size_codec_runs_both_ways_and_streams_if_it_is_causal(name):
    codec = made(name)
    samples = 7 * codec.samples_per_frame + 5
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, (2, samples)).astype(np.float32)
    lengths = np.array([samples, 3 * codec.samples_per_frame])
    codes, counts = (np.asarray(x) for x in codec.encode(audio, lengths))
    np.testing.assert_array_equal(counts, [8, 3])
    assert codes.shape == (2, 8, codec.num_codebooks)
    assert (codes >= 0).all() and (codes < codec.codebook_size).all()
    assert len(np.unique(codes)) > 20  # no frame is like the others
    spoken, _ = (np.asarray(x) for x in codec.decode(codes, counts))
    assert spoken.shape == (2, 8 * codec.samples_per_frame)
    assert np.isfinite(spoken).all() and np.abs(spoken).max() <= 1
    assert (spoken[1, 3 * codec.samples_per_frame :] == 0).all()
    if name in CAUSAL:
        _assert_streams(codec, codes[:1], spoken[:1])


def _assert_streams(codec, codes, spoken):
    """Decoding frame by frame equals decoding at once."""
    stream, waves = codec.new_stream(1), []
    for t in range(codes.shape[1]):
        wave, stream = codec.decode_step(stream, codes[:, t : t + 1])
        waves.append(np.asarray(wave))
    np.testing.assert_allclose(np.concatenate(waves, axis=1), spoken, rtol=0, atol=STREAM_ATOL)
    assert np.std(spoken) > 1e-3
