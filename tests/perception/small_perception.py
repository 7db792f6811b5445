"""Tiny encoders and perception modules for the tests of invariants, with reproducible weights."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.log_mel import LogMel, LogMelConfig
from speechlm2_jax.perception.perception import AudioPerception, PerceptionConfig
from speechlm2_jax.perception.spec_augment import SpecAugmentConfig
from tests.quick_compilation import QUICK

FP32_ATOL = 1e-5
NO_DROPOUT = dict.fromkeys(("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att"), 0.0)
ALL_DROPOUT = dict.fromkeys(NO_DROPOUT, 0.3)


def encoder_config(**changes):
    base = {
        "feat_in": 12,
        "n_layers": 2,
        "d_model": 16,
        "subsampling": "dw_striding",
        "subsampling_factor": 4,
        "subsampling_conv_channels": 4,
        "n_heads": 2,
        "ff_expansion_factor": 2,
        "conv_kernel_size": 5,
        **NO_DROPOUT,
    }
    return FastConformerConfig(**{**base, **changes})


def adapter_config(**changes):
    return encoder_config(**{"feat_in": 16, "subsampling_factor": 1, "n_layers": 1, **changes})


def perception_config(
    *,
    encoder=None,
    adapter=None,
    spec_augment=None,
    encoder_chunk_size_seconds=None,
    **preprocessor,
):
    mel = {"features": 12, "window_size": 0.025, "n_fft": 512, "pad_to": 0, **preprocessor}
    return PerceptionConfig(
        preprocessor=LogMelConfig(**mel),
        encoder=encoder or encoder_config(),
        modality_adapter=adapter or adapter_config(),
        output_dim=8,
        spec_augment=spec_augment,
        encoder_chunk_size_seconds=encoder_chunk_size_seconds,
    )


RANDOM_EVERYWHERE = {
    "encoder": encoder_config(**ALL_DROPOUT),
    "adapter": adapter_config(**ALL_DROPOUT),
    "spec_augment": SpecAugmentConfig(freq_masks=2, time_masks=2, freq_width=4, time_width=0.3),
    "dither": 0.1,
}


@cache
def encoder(config):
    """(graphdef, variables, paths of parameters) with all variables away from 0 and 1."""
    return _random(abstract(lambda rngs: FastConformer(config, rngs=rngs)))


@cache
def perception(config):
    graphdef, variables, parameters = _random(
        abstract(lambda rngs: AudioPerception(config, rngs=rngs))
    )
    tables = split(LogMel(config.preprocessor))[1]
    return graphdef, variables | {f"log_mel.{k}": v for k, v in tables.items()}, parameters


def _random(module):
    """Draws weights; scales (of norms) and running variances start from 1."""
    rng = np.random.default_rng(0)
    infos = describe(module)
    variables = {}
    for path, info in infos.items():
        one = path.endswith("running_var") or "norm.weight" in path
        spread = 0.1 if len(info.shape) <= 1 + info.is_stacked else 0.3
        value = rng.normal(0.0, spread, info.shape)
        value = 1.0 + np.abs(value) if one else value
        variables[path] = jnp.asarray(value, info.dtype)
    parameters = tuple(path for path, info in infos.items() if not info.is_buffer)
    return split(module)[0], variables, parameters


def select(variables, parameters):
    return {k: variables[k] for k in parameters}


def example_rngs(*ids):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.asarray(ids))


def padded(sequences, size, fill=3.0):
    """Pads sequences to one array with a large fill value; returns it and the lengths."""
    batch = np.full((len(sequences), size, *sequences[0].shape[1:]), fill, np.float32)
    for i, sequence in enumerate(sequences):
        batch[i, : len(sequence)] = sequence
    return jnp.asarray(batch), jnp.asarray([len(s) for s in sequences], jnp.int32)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


quick_jit = partial(jax.jit, compiler_options=QUICK)


@partial(quick_jit, static_argnames=("graphdef", "train", "modes", "return_layers"))
def run(graphdef, variables, *args, **kwargs):
    """Runs a module; calls that differ in values alone share one compiled program."""
    return merge(graphdef, variables)(*args, **kwargs)


def assert_close(actual, expected, atol=FP32_ATOL):
    """Differences are at most `atol` of the largest value, or of 1."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    size = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, atol=atol * size, rtol=0)


def assert_all_close(actual, expected, atol=FP32_ATOL):
    assert set(actual) == set(expected)
    for name in expected:
        assert_close(actual[name], expected[name], atol)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf)).all()
