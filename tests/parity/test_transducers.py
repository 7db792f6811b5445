"""Transducers equal NeMo 3.0.0: prediction network, joint, and every greedy hypothesis."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.asr.ctc import best_path
from speechlm2_jax.asr.greedy import decode_greedily
from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.conversion.transducer import transducer_table
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.settings import build

ASR = Path(__file__).parents[1] / "data" / "asr"
LAYER_ATOL = 1e-5
MODEL_ATOL = 1e-4
NAMES = ("rnnt", "rnnt_2layer", "tdt", "hybrid_streaming")
HYPOTHESES = json.loads((ASR / "hypotheses.json").read_text())
SETTINGS = [
    (name, setting)
    for name in NAMES
    for setting in HYPOTHESES[name]["decoding"]
    if setting != "ctc_greedy"
]


def config_of(archive):
    blocks = {k: archive.config[k] for k in ("preprocessor", "encoder", "decoder", "joint")}
    durations = archive.config["decoding"].get("durations") or []
    has_head = "aux_ctc" in archive.config
    return build(TransducerConfig, {**blocks, "durations": durations, "has_ctc_head": has_head})


@cache
def model(name):
    """(graphdef, variables, config) of an archive."""
    archive = read_nemo(ASR / f"{name}.nemo")
    config = config_of(archive)
    module = abstract(lambda rngs: TransducerNetwork(config, rngs=rngs))
    variables = mapping.load(archive.weights, transducer_table(config), describe(module))
    arrays = {path: jnp.asarray(value) for path, value in variables.items()}
    return split(module)[0], arrays, config


@cache
def golden(name):
    return load_file(ASR / f"{name}_golden.safetensors")


@cache
def encoded(name):
    """Frames and their numbers, of the golden audio padded to its longest row."""
    given, (graphdef, variables, _) = golden(name), model(name)
    lengths = given["audio_len"]
    audio = np.zeros((len(lengths), lengths.max()), np.float32)
    rows = np.split(given["audio"], np.cumsum(lengths)[:-1])
    for row, samples in zip(audio, rows, strict=True):
        row[: len(samples)] = samples
    run = jax.jit(lambda v: merge(graphdef, v)(jnp.asarray(audio), jnp.asarray(lengths, jnp.int32)))
    output = run(variables)
    return output.frames, output.lengths


def assert_close(actual, expected, atol):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_encodings_equal_nemo_also_of_a_causal_chunk_limited_encoder(name):
    frames, lengths = encoded(name)
    given = golden(name)
    np.testing.assert_array_equal(lengths, given["encoded_len"])
    for row, count in enumerate(given["encoded_len"]):
        expected = given["encoded_BDT"][row, :, :count].T
        assert_close(frames[row, :count], expected, MODEL_ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_prediction_network_equals_nemo_taught_and_step_by_step(name):
    graphdef, variables, config = model(name)
    given, network = golden(name), merge(graphdef, variables)
    labels = jnp.asarray(given["pred/labels"], jnp.int32)
    outputs, state = network.prediction(labels)
    assert_close(outputs.swapaxes(1, 2), given["pred/out_BDU1"], LAYER_ATOL)
    assert_close(state.output, given["pred/final_state0"], LAYER_ATOL)
    assert_close(state.cell, given["pred/final_state1"], LAYER_ATOL)
    rows = len(given["pred/sos_out"])
    blanks = jnp.full(rows, config.blank)
    output, state = network.prediction.step(blanks, network.prediction.initial_state(rows))
    assert_close(output, given["pred/sos_out"][:, 0], LAYER_ATOL)
    assert_close(state.output, given["pred/sos_h"], LAYER_ATOL)
    assert_close(state.cell, given["pred/sos_c"], LAYER_ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_joint_equals_nemo(name):
    graphdef, variables, _ = model(name)
    given, network = golden(name), merge(graphdef, variables)
    expected = given["joint/log_probs_BTUV"]
    outputs, _ = network.prediction(jnp.asarray(given["pred/labels"], jnp.int32))
    frames = jnp.asarray(given["encoded_BDT"].swapaxes(1, 2)[: len(expected), : expected.shape[1]])
    log_probs = jax.nn.log_softmax(network.joint(frames, outputs), axis=-1)
    # scores of up to 15: processors sum a row's products in orders of their own, and what that
    # rounds grows with the score
    assert_close(log_probs, expected, LAYER_ATOL * np.abs(expected).max())


@cache
def decode(name, **limits):
    graphdef, variables, _ = model(name)
    frames, lengths = encoded(name)
    run = jax.jit(lambda v: decode_greedily(merge(graphdef, v), frames, lengths, **limits))
    return run(variables)


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_labels_frames_and_durations_equal_nemo(name, setting):
    golden_run = HYPOTHESES[name]["decoding"][setting]
    cfg = golden_run["cfg"]
    found = decode(
        name,
        max_symbols=cfg.get("greedy.max_symbols", 10),
        jumps_when_full=cfg.get("strategy") == "greedy",
    )
    for row, expected in enumerate(golden_run["hyps"]):
        count = int(found.lengths[row])
        assert found.labels[row, :count].tolist() == expected["y_sequence"]
        assert found.frames[row, :count].tolist() == expected["timestamp"]
        if expected["token_duration"]:
            assert found.durations[row, :count].tolist() == expected["token_duration"]


def test_the_ctc_head_of_a_hybrid_model_equals_nemo():
    graphdef, variables, _ = model("hybrid_streaming")
    given, (frames, lengths) = golden("hybrid_streaming"), encoded("hybrid_streaming")
    logits = merge(graphdef, variables).logits(frames)
    paths = np.asarray(best_path(logits, lengths))
    hypotheses = HYPOTHESES["hybrid_streaming"]["decoding"]["ctc_greedy"]["hyps"]
    for row, (count, expected) in enumerate(zip(lengths.tolist(), hypotheses, strict=True)):
        log_probs = jax.nn.log_softmax(logits[row, :count], axis=-1)
        assert_close(log_probs, given["ctc/log_probs_BTV"][row, :count], MODEL_ATOL)
        assert paths[row, :count].tolist() == expected["y_sequence"]
