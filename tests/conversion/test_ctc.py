"""CTC models of NeMo load completely, export bit for bit, and transcribe the same."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from speechlm2_jax.asr.ctc import CtcConfig, CtcNetwork
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.ctc import CTC_HEAD, HYBRID_HEAD, ctc_table
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import memory_source, read_nemo
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.log_mel import LogMelConfig
from speechlm2_jax.settings import build
from tests.conversion.goldens import DATA, assert_same_bits, tensors

ASR = DATA / "asr"
HYBRID = json.loads((ASR / "hybrid_names.json").read_text())
MODEL_ATOL = 1e-4


def network_config(blocks: dict[str, Any]) -> CtcConfig:
    return CtcConfig(
        preprocessor=build(LogMelConfig, blocks["preprocessor"], "model.preprocessor"),
        encoder=build(FastConformerConfig, blocks["encoder"], "model.encoder"),
        vocab_size=40,
    )


def infos(config: CtcConfig):
    return describe(abstract(lambda rngs: CtcNetwork(config, rngs=rngs)))


def hybrid_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in HYBRID["shapes"].items()}


def is_transducer(name: str) -> bool:
    return name.startswith(("decoder.", "joint."))


def test_ctc_model_comes_back_bit_for_bit():
    archive = read_nemo(ASR / "ctc.nemo")
    config = network_config(archive.config)
    table = ctc_table(config.perception)
    variables = mapping.load(archive.weights, table, infos(config))
    assert variables["head.weight"].shape == (41, 32)
    assert_same_bits(mapping.export(variables, table), tensors(archive.weights))


def test_hybrid_model_comes_back_bit_for_bit_but_for_its_transducer():
    config, given = network_config(HYBRID), hybrid_tensors()
    table = ctc_table(config.perception, head=HYBRID_HEAD)
    variables = mapping.load(memory_source(given), table, infos(config))
    expected = {n: x for n, x in given.items() if not is_transducer(n)}
    assert len(given) - len(expected) == 11
    assert_same_bits(mapping.export(variables, table), expected)


@pytest.mark.parametrize("head", [CTC_HEAD, HYBRID_HEAD])
def test_either_place_of_the_head_is_read_and_the_asked_one_written(head):
    config, given = network_config(HYBRID), hybrid_tensors()
    table = ctc_table(config.perception, head=head)
    written = mapping.export(mapping.load(memory_source(given), table, infos(config)), table)
    assert {n for n in written if "decoder" in n} == {
        f"{head}.decoder_layers.0.weight",
        f"{head}.decoder_layers.0.bias",
    }


def test_a_model_without_a_ctc_head_is_refused_by_name():
    config = network_config(HYBRID)
    given = {n: x for n, x in hybrid_tensors().items() if not n.startswith("ctc_decoder.")}
    with pytest.raises(ConversionError, match=r"lacks decoder\.decoder_layers\.0\.bias"):
        mapping.load(memory_source(given), ctc_table(config.perception), infos(config))


def test_a_tensor_of_no_known_part_is_refused_by_name():
    config = network_config(HYBRID)
    given = {**hybrid_tensors(), "decoder.decoder_layers.1.weight": np.zeros(1, np.float32)}
    with pytest.raises(ConversionError, match=r"no place for: decoder\.decoder_layers\.1"):
        mapping.load(memory_source(given), ctc_table(config.perception), infos(config))


def test_log_probabilities_equal_those_of_nemo_before_and_after_writing(tmp_path):
    archive = read_nemo(ASR / "ctc.nemo")
    config, golden = network_config(archive.config), load_file(ASR / "ctc_golden.safetensors")
    table = ctc_table(config.perception)
    variables = mapping.load(archive.weights, table, infos(config))
    files = {n: archive.artifact(n) for n in archive.members if not n.startswith("model_")}
    copy = tmp_path / "copy.nemo"
    write_nemo(copy, archive.config, mapping.export(variables, table), files)
    again = mapping.load(read_nemo(copy).weights, table, infos(config))
    graphdef = split(abstract(lambda rngs: CtcNetwork(config, rngs=rngs)))[0]

    @jax.jit
    def log_probs(variables):
        network = merge(graphdef, variables)
        output = network(jnp.asarray(golden["audio"]), jnp.asarray(golden["audio_len"], jnp.int32))
        return jax.nn.log_softmax(network.logits(output.frames), axis=-1), output.lengths

    for values in (variables, again):
        actual, lengths = log_probs(values)
        np.testing.assert_array_equal(lengths, golden["frames"])
        for row, frames in enumerate(golden["frames"]):
            np.testing.assert_allclose(
                actual[row, :frames], golden["log_probs"][row, :frames], atol=MODEL_ATOL
            )
