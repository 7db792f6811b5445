"""Weights are in memory once: loading reads into the arrays that programs are given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.full_size import LAYOUTS, make
from speechlm2_jax.conversion.readers import memory_source, open_weights, write_safetensors
from speechlm2_jax.conversion.readers.source import ALIGNMENT_BYTES, aligned_empty
from speechlm2_jax.inference.stages import on_default_device
from speechlm2_jax.models import SALM

ROOT = Path(__file__).parents[2]
MOST = 1.25
"""Anonymous memory over the size of the weights."""


@pytest.mark.parametrize("shape", [(3, 5), (), (1, 4), (70_000,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_aligned_arrays_are_aligned_and_of_their_shape(shape, dtype):
    made = aligned_empty(shape, jax.numpy.dtype(dtype))
    assert made.shape == shape and made.dtype == dtype
    assert made.ctypes.data % ALIGNMENT_BYTES == 0 and made.flags["C_CONTIGUOUS"]


def test_a_cpu_takes_loaded_arrays_without_a_copy():
    array = aligned_empty((64, 32), np.dtype(np.float32))
    array[...] = 3.0
    address = array.ctypes.data
    wide = np.ones(2, np.float64)
    placed = on_default_device({"a": array, "b": wide})
    assert placed["a"].unsafe_buffer_pointer() == address
    assert placed["b"] is wide  # JAX would make it fp32


@pytest.mark.parametrize("kind", ["safetensors", "shards", "memory"])
def test_tensors_are_read_into_arrays(tmp_path, kind):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=(2, 5)).astype(jax.numpy.bfloat16),
        "n": np.array(7, np.int64),
        "none": np.zeros((0, 2), np.float32),
    }
    if kind == "memory":
        source = memory_source(tensors)
    else:
        write_safetensors(tmp_path / "model.safetensors", tensors)
        if kind == "shards":
            weight_map = dict.fromkeys(tensors, "model-1.safetensors")
            (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
            index = tmp_path / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": weight_map}))
        source = open_weights(tmp_path)
    for name, value in tensors.items():
        out = aligned_empty(value.shape, value.dtype)
        source.read_into(name, out)
        assert out.tobytes() == value.tobytes()


def test_a_loaded_model_holds_arrays_of_the_default_device(tmp_path):
    make(tmp_path / "model", LAYOUTS["micro"], "bfloat16")
    model = SALM.from_pretrained(tmp_path / "model")
    floats = [x for x in model.variables.values() if x.dtype == jax.numpy.bfloat16]
    assert len(floats) > 30 and all(isinstance(x, jax.Array) for x in model.variables.values())
    stored = open_weights(tmp_path / "model")
    name = "llm.base_model.model.model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(model.variables["llm.layers.mlp.up.weight"][0], stored.read(name))


@pytest.mark.slow  # half a gigabyte, in a process of its own
def test_loading_and_generation_hold_the_weights_once(tmp_path):
    make(tmp_path / "model", LAYOUTS["smollm2-135m"], "float32")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.full_size", "run", str(tmp_path / "model")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["file_gb"] > 0.5
    assert 0.9 < result["peak_over_file"] < MOST
