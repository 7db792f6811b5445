"""The codec equals NeMo 3.0.0, part by part; the tensors are in tests/data/codec."""

from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from speechlm2_jax.codec.activations import PLAIN, Activation, snake
from speechlm2_jax.codec.boundary import SequenceBoundary
from speechlm2_jax.codec.config import (
    FiniteScalarQuantizerConfig,
    GroupFiniteScalarQuantizerConfig,
)
from speechlm2_jax.codec.convolutions import DownsampleConv, SameRateConv, UpsampleConv
from speechlm2_jax.codec.decoder import BOUNDED, DecoderStage
from speechlm2_jax.codec.encoder import EncoderStage, HiFiGANEncoder
from speechlm2_jax.codec.finite_scalar_quantizer import FiniteScalarQuantizer
from speechlm2_jax.codec.resampling import resample, resampled_length
from speechlm2_jax.layers.module import abstract, merge, split
from speechlm2_jax.models.codec import AudioCodec
from tests.parity.sampled import assert_recorded
from tests.perception.small_perception import quick_jit

DATA = Path(__file__).parents[1] / "data" / "codec"
LAYER_ATOL = 1e-5
AUDIO_ATOL = 1e-4
CODECS = ("lfr22_tiny", "nano12_tiny", "causal_tiny")
OTHER_RATES = {"lfr22_tiny": 16000, "nano12_tiny": 16000, "causal_tiny": 22050}
FRAMES = {"lfr22_tiny": 9, "nano12_tiny": 6, "causal_tiny": 11}
"""Of every encoded array, so that one program serves them all."""
LEVELS = ("8x7x6x6", "9x8x8x7", "8x5x5x5", "8x8x8", "3x2x11x15")


@cache
def tensors(name):
    return load_file(DATA / f"{name}.safetensors")


def assert_close(actual, expected, atol=LAYER_ATOL, size=1.0):
    """Differences are at most `atol` of the largest value, or of `size`."""
    size = max(size, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(np.asarray(actual), expected, atol=atol * size, rtol=0)


def assert_recorded_close(actual, given, name, atol=LAYER_ATOL):
    """As `assert_close`, for a tensor of which a sample may be kept."""
    size = max(1.0, np.abs(np.asarray(actual)).max(initial=0.0))
    assert_recorded(np.asarray(actual), given, name, atol=atol * size, rtol=0)


def steps_last(x):
    return np.asarray(x).swapaxes(1, 2)


def steps_first(x):
    return jnp.asarray(x.swapaxes(1, 2))


@pytest.mark.parametrize("name", LEVELS)
def test_quantizer_equals_nemo(name):
    given = {k.removeprefix(f"{name}/"): v for k, v in tensors("fsq").items() if name in k}
    levels = tuple(int(level) for level in name.split("x"))
    quantizer = FiniteScalarQuantizer(FiniteScalarQuantizerConfig(num_levels=levels))
    x = steps_first(given["inputs"])
    table = jnp.asarray(given["table_indices"], jnp.int32)[None, :, None]
    (values, codes), compressed, table_values = quick_jit(
        lambda: (quantizer(x), quantizer.compress(x), quantizer.dequantize(table))
    )()
    assert_close(steps_last(compressed), given["compressed"])
    assert_close(steps_last(values), given["codes_nomask"])
    is_real = np.arange(x.shape[1])[None] < given["len"][:, None]
    np.testing.assert_array_equal(np.where(is_real, codes[..., 0], 0), given["indices"][0])
    assert_close(steps_last(np.where(is_real[..., None], values, 0)), given["dequantized"])
    assert_close(table_values[0], given["table_codes"])


def test_grouped_quantizer_equals_nemo():
    given = {k.removeprefix("group3/"): v for k, v in tensors("fsq").items()}
    quantizer = FiniteScalarQuantizer(
        GroupFiniteScalarQuantizerConfig(num_groups=3, num_levels=(8, 7, 6, 6))
    )
    values, codes = quick_jit(quantizer)(steps_first(given["inputs"]))
    is_real = (np.arange(codes.shape[1])[None] < given["len"][:, None])[..., None]
    expected = given["indices_CBT"].transpose(1, 2, 0)
    np.testing.assert_array_equal(np.where(is_real, codes, 0), expected)
    assert_close(steps_last(np.where(is_real, values, 0)), given["dequantized"])
    decoded = np.where(is_real, quantizer.dequantize(jnp.asarray(expected)), 0)
    assert_close(steps_last(decoded), given["decoded"])


def test_the_gradient_passes_straight_through_as_in_nemo():
    given = tensors("fsq")
    quantizer = FiniteScalarQuantizer(FiniteScalarQuantizerConfig(num_levels=(8, 7, 6, 6)))
    _, pull = jax.vjp(lambda x: quantizer(x).values, steps_first(given["ste/inputs"]))
    (gradient,) = pull(steps_first(given["ste/cotangent"]))
    assert_close(steps_last(gradient), given["ste/grad"])


# -- single layers ----------------------------------------------------------------------------


def test_activations_equal_nemo():
    given = tensors("layers")
    x = steps_first(given["x"])
    functions = {name: PLAIN[name] for name in ("elu", "lrelu")} | {"clamp": BOUNDED["clamp"]}
    for name, alpha in (("snake", "alpha"), ("half_snake", "snake_act.alpha")):
        functions[name] = Activation(name, x.shape[-1], rngs=nnx.Rngs(0))
        functions[name].alpha[...] = jnp.asarray(given[f"{name}/activation.{alpha}"][0, :, 0])
    for name, output in quick_jit(lambda: {n: f(x) for n, f in functions.items()})().items():
        assert_close(steps_last(output), given[f"{name}/y"])


def test_snake_is_exact_far_from_zero():
    x = np.linspace(-3000, 3000, 10001, dtype=np.float32).reshape(1, -1, 1)
    expected = x + np.sin(1.5 * x.astype(np.float64)) ** 2 / 1.5
    error = np.asarray(snake(jnp.asarray(x), jnp.asarray([1.5]))) - expected
    # the product with alpha is itself rounded: half a unit in the last place of 4500
    assert np.abs(error).max() < 3e-4
    near = np.abs(x) < 10
    assert np.abs(error[near]).max() < 2e-6


LAYERS = {
    "Conv1dNorm_k7_reflect": lambda r: SameRateConv(
        3, 4, 7, is_causal=False, pad_mode="reflect", rngs=r
    ),
    "Conv1dNorm_k3_d5_replicate": lambda r: SameRateConv(
        3, 4, 3, dilation=5, is_causal=False, pad_mode="replicate", rngs=r
    ),
    "Conv1dNorm_down7": lambda r: DownsampleConv(
        3, 4, 7, is_causal=False, pad_mode="reflect", rngs=r
    ),
    "Conv1dNorm_down4": lambda r: DownsampleConv(
        3, 4, 4, is_causal=False, pad_mode="zeros", rngs=r
    ),
    "CausalConv1dNorm_k7_d3": lambda r: SameRateConv(
        3, 4, 7, dilation=3, is_causal=True, pad_mode="zeros", rngs=r
    ),
    "CausalConv1dNorm_down4": lambda r: DownsampleConv(
        3, 4, 4, is_causal=True, pad_mode="zeros", rngs=r
    ),
    "CausalConv1dNorm_down7": lambda r: DownsampleConv(
        3, 4, 7, is_causal=True, pad_mode="zeros", rngs=r
    ),
    "ConvTranspose1dNorm_up7": lambda r: UpsampleConv(
        3, 4, 7, is_causal=False, is_grouped=False, rngs=r
    ),
    "ConvTranspose1dNorm_up4": lambda r: UpsampleConv(
        3, 4, 4, is_causal=False, is_grouped=False, rngs=r
    ),
    "CausalConvTranspose1dNorm_up7_g1": lambda r: UpsampleConv(
        3, 4, 7, is_causal=True, is_grouped=False, rngs=r
    ),
    "CausalConvTranspose1dNorm_up4_gout": lambda r: UpsampleConv(
        6, 3, 4, is_causal=True, is_grouped=True, rngs=r
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_convolution_equals_nemo(name):
    given = tensors("layers")
    part = {k.removeprefix(f"conv/{name}/"): v for k, v in given.items() if f"/{name}/" in k}
    layer = abstract(LAYERS[name])
    stored = {"weight.gain": part["g"][:, 0, 0], "weight.direction": part["v"]}
    layer = merge(split(layer)[0], {**stored, "bias": part["bias"]})
    x = steps_first(given["conv/x"])
    if name.endswith("gout"):
        x = jnp.concatenate([x, -0.5 * x], axis=-1)  # as the generator made six channels
    lengths = jnp.asarray(given["conv/len"], jnp.int32)
    boundary = SequenceBoundary(lengths=lengths, ends=jnp.full(lengths.shape, x.shape[1]))
    if isinstance(layer, DownsampleConv):  # its steps must be whole blocks
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % layer.rate), (0, 0)))
    y, weight = quick_jit(lambda x, boundary: (layer(x, boundary), layer.weight()))(x, boundary)
    y, boundary = y if isinstance(y, tuple) else (y, boundary)
    assert_close(weight, part["effective"])
    np.testing.assert_array_equal(boundary.lengths, part["out_len"])
    assert_close(steps_last(y)[..., : part["y"].shape[2]], part["y"])


# -- whole codecs -----------------------------------------------------------------------------


@cache
def model(name):
    return AudioCodec.from_pretrained(DATA / f"{name}.nemo")


def codec_of(name):
    return merge(model(name)._graphdef, model(name).variables)


@contextmanager
def recorded(*classes):
    """Collects, while a function is traced, what the modules of these classes return."""
    seen = {cls: [] for cls in classes}

    def recording(cls, call):
        def run(self, *args):
            output = call(self, *args)
            seen[cls].append(output[0] if isinstance(output, tuple) else output)
            return output

        return run

    with ExitStack() as patches:
        for cls in classes:
            patch = mock.patch.object(cls, "__call__", recording(cls, cls.__call__))
            patches.enter_context(patch)
        yield seen


@cache
def programs(name):
    """(encode, decode) with what their parts gave, each compiled once."""
    graphdef = model(name)._graphdef

    @quick_jit
    def encode(variables, audio, lengths, extent):
        with recorded(EncoderStage, HiFiGANEncoder) as seen:
            output = merge(graphdef, variables).encode(
                audio, lengths, nemo_exact=True, extent=extent
            )
        return output, seen[EncoderStage], seen[HiFiGANEncoder][0]

    @quick_jit
    def decode(variables, codes, lengths, extent):
        with recorded(SameRateConv, UpsampleConv, DecoderStage) as seen:
            output = merge(graphdef, variables).decode(
                codes, lengths, nemo_exact=True, extent=extent
            )
        return output, seen[SameRateConv][0], seen[UpsampleConv], seen[DecoderStage]

    return encode, decode


def encode(name, audio, lengths, extent):
    """Runs the one program: rows and samples are padded, loudly, to its shape."""
    samples = model(name).samples_per_frame * FRAMES[name]
    rows = len(audio)
    padded = np.full((3, samples), 9.0, np.float32)
    padded[:rows, : audio.shape[1]] = audio
    lengths = np.pad(np.asarray(lengths, np.int32), (0, 3 - rows))
    extent = np.broadcast_to(np.asarray(extent, np.int32), (rows,))
    extent = np.pad(extent, (0, 3 - rows))
    output, stages, frames = programs(name)[0](
        model(name).variables, jnp.asarray(padded), jnp.asarray(lengths), jnp.asarray(extent)
    )
    return output.codes[:rows], output.lengths[:rows], stages, frames[:rows]


@pytest.mark.parametrize("kind", ["batch", "garbage"])
@pytest.mark.parametrize("name", CODECS)
def test_encoding_a_batch_equals_nemo(name, kind):
    given = tensors(name)
    audio, lengths = given[f"{kind}/audio"], given["batch/audio_len"]
    codes, counts, stages, frames = encode(name, audio, lengths, audio.shape[1])
    expected = given[f"{kind}/tokens"]
    longest = expected.shape[2]
    np.testing.assert_array_equal(steps_last(codes)[..., :longest], expected)
    assert not np.asarray(codes)[:, longest:].any()
    np.testing.assert_array_equal(counts, given["batch/encoded_len"])
    assert [model(name).config.frame_count(int(n)) for n in lengths] == counts.tolist()
    assert_close(steps_last(frames)[..., :longest], given[f"{kind}/encoded"])
    if kind == "batch":
        points = {int(k[-1]): v for k, v in given.items() if "enc_down" in k}
        assert points
        for stage, value in points.items():
            assert_close(steps_last(stages[stage])[..., : value.shape[2]], value)


@pytest.mark.parametrize("name", CODECS)
def test_encoding_alone_equals_nemo(name):
    """The default: each row as if it were alone, whatever lies beside and behind it."""
    given = tensors(name)
    lengths = given["batch/audio_len"]
    # what the default mode means, in terms of the one program
    codes, _, _, frames = encode(name, given["batch/audio"], lengths, lengths)
    alone = [i for i in range(3) if f"single{i}/tokens" in given]
    assert alone
    for i in alone:
        expected = given[f"single{i}/tokens"][0]
        count = expected.shape[1]
        np.testing.assert_array_equal(codes[i, :count].T, expected)
        # the last convolution of these codecs amplifies rounding as much as a batch's frames
        size = np.abs(given["batch/encoded"]).max()
        assert_close(frames[i, :count].T, given[f"single{i}/encoded"][0], size=size)


@pytest.mark.parametrize("name", CODECS)
def test_resampling_equals_nemo(name):
    given = tensors(name)
    lengths, rates = given["resample/audio_len"], (OTHER_RATES[name], model(name).sample_rate)
    audio = np.asarray(quick_jit(lambda x: resample(x, *rates))(given["resample/audio"]))
    count = resampled_length(int(lengths[0]), *rates)
    assert model(name).config.frame_count(count) == given["resample/tokens_len"][0]
    expected = given["resample/padded_audio"]
    padded = np.zeros_like(expected)
    padded[:, :count] = audio[:, :count]
    assert_close(padded, expected)
    codes, _, _, _ = encode(name, padded, [count], padded.shape[1])
    expected = given["resample/tokens"]
    np.testing.assert_array_equal(steps_last(codes)[..., : expected.shape[2]], expected)


def decode(name, codes, lengths, extent):
    padded = np.full((3, 7, codes.shape[2]), 5, np.int32)
    padded[:, : codes.shape[1]] = codes
    extent = np.broadcast_to(np.asarray(extent, np.int32), (3,))
    lengths = jnp.asarray(lengths, jnp.int32)
    return programs(name)[1](
        model(name).variables, jnp.asarray(padded), lengths, jnp.asarray(extent)
    )


@pytest.mark.parametrize("name", CODECS)
def test_decoding_a_batch_equals_nemo(name):
    given = tensors(name)
    codes, lengths = given["decode/tokens"].swapaxes(1, 2), given["decode/tokens_len"]
    output, first, ups, stages = decode(name, codes, lengths, codes.shape[1])
    np.testing.assert_array_equal(output.lengths, given["decode/audio_len"])
    assert_recorded_close(output.audio, given, "decode/audio", AUDIO_ATOL)
    for point, value in (
        ("dec_pre_conv", first),
        ("dec_up0", ups[0]),
        ("dec_res0", stages[0]),
        ("dec_res1", stages[1]),
    ):
        assert_recorded_close(steps_last(value), given, f"decode/{point}")
    frames = codec_of(name).quantizer.dequantize(jnp.asarray(codes, jnp.int32))
    is_real = (np.arange(7)[None] < lengths[:, None])[..., None]
    assert_close(steps_last(np.where(is_real, frames, 0)), given["decode/dequantized"])


@pytest.mark.parametrize("name", CODECS)
def test_encoding_and_decoding_equal_nemo(name):
    given = tensors(name)
    codes, counts = given["batch/tokens"].swapaxes(1, 2), given["batch/tokens_len"]
    output, *_ = decode(name, codes, counts, codes.shape[1])
    longest = given["batch/recon_len"].max()
    assert_recorded_close(output.audio[:, :longest], given, "batch/recon", AUDIO_ATOL)
    assert not np.asarray(output.audio)[:, longest:].any()
    np.testing.assert_array_equal(output.lengths, given["batch/recon_len"])


@pytest.mark.parametrize("name", CODECS)
def test_decoding_alone_equals_nemo(name):
    given = tensors(name)
    codes, lengths = given["decode/tokens"].swapaxes(1, 2), given["decode/tokens_len"]
    output, *_ = decode(name, codes, lengths, lengths)
    for i in (1, 2):
        if f"decode/single{i}" in given:
            expected = given[f"decode/single{i}"][0]
            assert_close(output.audio[i, : len(expected)], expected, AUDIO_ATOL)


@pytest.mark.parametrize("name", CODECS)
def test_a_row_of_any_length_has_codes_and_audio_of_its_own(name):
    """Also one shorter than a frame, or than what convolutions mirror, where NeMo fails."""
    size = model(name).samples_per_frame
    audio = np.random.default_rng(1).normal(0, 0.1, (3, 5 * size)).astype(np.float32)
    lengths = np.array([1, size + 7, 5 * size])
    codes, counts, _, _ = encode(name, audio, lengths, lengths)
    assert counts.tolist() == [1, 2, 5] and not np.asarray(codes)[0, 1:].any()
    assert np.asarray(codes).max() < model(name).codebook_size
    back = slice(None, None, -1)
    others, _, _, _ = encode(name, audio[back], lengths[back], lengths[back])
    np.testing.assert_array_equal(others[back], codes)
    wave = np.asarray(decode(name, codes[:, :5], counts, counts)[0].audio)
    assert np.isfinite(wave).all() and not wave[0, size:].any() and wave[0, :size].any()
    other = np.asarray(decode(name, others[:, :5], counts[back], counts[back])[0].audio)
    assert_close(other[back], wave, AUDIO_ATOL)


@pytest.mark.parametrize("name", [name for name in CODECS if name != "lfr22_tiny"])
def test_a_stream_is_what_decoding_offline_gives(name):
    size, lengths = model(name).samples_per_frame, np.full(3, 7)
    given = np.random.default_rng(0).integers(0, model(name).codebook_size, (3, 7, 1))
    codes = (given + np.arange(model(name).num_codebooks)) % model(name).codebook_size
    whole = decode(name, codes, lengths, lengths)[0].audio
    step = quick_jit(
        lambda variables, stream, frame: merge(model(name)._graphdef, variables).decode_step(
            stream, frame
        )
    )
    stream = model(name).new_stream(batch=3)
    for frame in range(7):
        wave, stream = step(model(name).variables, stream, jnp.asarray(codes[:, frame, None]))
        assert wave.shape == (3, size)
        assert_close(wave, np.asarray(whole)[:, frame * size :][:, :size], AUDIO_ATOL)


@pytest.mark.parametrize("name", CODECS)
def test_effective_kernels_equal_torchs(name):
    given = tensors(name)
    codec = codec_of(name)
    assert_close(codec.encoder.input.weight(), given["weights/enc_pre_conv_effective"])
    assert_close(codec.decoder.stages[0].up.weight(), given["weights/dec_up0_effective"])
