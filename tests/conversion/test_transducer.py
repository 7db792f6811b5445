"""Transducers of NeMo load completely and come back bit for bit."""

import json
from typing import Any

import pytest

from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import memory_source, read_nemo
from speechlm2_jax.conversion.transducer import transducer_table
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.settings import SettingsError, build
from tests.conversion.goldens import DATA, assert_same_bits, tensors

ASR = DATA / "asr"
NAMES = ("rnnt", "rnnt_2layer", "tdt", "hybrid_streaming")


def network_config(blocks: dict[str, Any], **more: Any) -> TransducerConfig:
    given = {key: blocks[key] for key in ("preprocessor", "encoder", "decoder", "joint")}
    durations = blocks.get("decoding", {}).get("durations") or []
    given |= {"durations": durations, "has_ctc_head": "aux_ctc" in blocks}
    return build(TransducerConfig, {**given, **more}, "model")


def infos(config: TransducerConfig):
    return describe(abstract(lambda rngs: TransducerNetwork(config, rngs=rngs)))


@pytest.mark.parametrize("name", NAMES)
def test_a_transducer_comes_back_bit_for_bit(name):
    archive = read_nemo(ASR / f"{name}.nemo")
    config = network_config(archive.config)
    table = transducer_table(config)
    variables = mapping.load(archive.weights, table, infos(config))
    assert_same_bits(mapping.export(variables, table), tensors(archive.weights))


def test_dropout_in_the_joint_shifts_the_number_of_its_last_layer():
    archive = read_nemo(ASR / "rnnt.nemo")
    joint = archive.config["joint"]
    dropped = {**joint, "jointnet": {**joint["jointnet"], "dropout": 0.2}}
    config = network_config({**archive.config, "joint": dropped})
    given = {
        n.replace("joint_net.1", "joint_net.2"): x for n, x in tensors(archive.weights).items()
    }
    table = transducer_table(config)
    variables = mapping.load(memory_source(given), table, infos(config))
    assert_same_bits(mapping.export(variables, table), given)


def test_a_head_that_the_config_does_not_promise_is_refused_by_name():
    archive = read_nemo(ASR / "hybrid_streaming.nemo")
    config = network_config(archive.config, has_ctc_head=False)
    with pytest.raises(
        ConversionError, match=r"no place for: ctc_decoder\.decoder_layers\.0\.bias"
    ):
        mapping.load(archive.weights, transducer_table(config), infos(config))


@pytest.mark.parametrize(
    ("block", "change", "message"),
    [
        ("joint", {"num_classes": 7}, r"joint\.num_classes=7 must be decoder\.vocab_size: 40"),
        ("joint", {"num_extra_outputs": 2}, r"num_extra_outputs=2 must be the number of durations"),
        ("decoder", {"blank_as_pad": False}, "blank_as_pad=false"),
        ("decoder", {"normalization_mode": "layer"}, "normalization_mode"),
        ("decoder", {"_target_": "x.StatelessTransducerDecoder"}, "use RNNTDecoder"),
        ("joint", {"_target_": "x.HATJoint"}, "use RNNTJoint"),
    ],
)
def test_an_architecture_that_is_not_done_is_refused_by_name(block, change, message):
    blocks = read_nemo(ASR / "rnnt.nemo").config
    with pytest.raises(SettingsError, match=message):
        network_config({**blocks, block: {**blocks[block], **change}})


def test_the_names_of_a_published_hybrid_model_are_all_taken():
    names = json.loads((ASR / "hybrid_names.json").read_text())
    config = build(
        TransducerConfig,
        {
            **{key: names[key] for key in ("preprocessor", "encoder")},
            "decoder": {"vocab_size": 40, "prednet": {"pred_hidden": 24, "pred_rnn_layers": 1}},
            "joint": {
                "num_classes": 40,
                "jointnet": {
                    "encoder_hidden": 32,
                    "pred_hidden": 24,
                    "joint_hidden": 20,
                    "activation": "relu",
                },
            },
            "has_ctc_head": True,
        },
    )
    written = mapping.names(transducer_table(config), infos(config))
    assert {s.name for s in written} == set(names["shapes"])
