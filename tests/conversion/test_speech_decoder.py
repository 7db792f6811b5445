"""NeMo's speech decoders come back bit for bit, but for the masks that are computed here."""

import json

import numpy as np
import pytest

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import memory_source
from speechlm2_jax.conversion.speech_decoder import speech_decoder_table, transformer_table
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.settings import build
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from speechlm2_jax.speech_decoder.decoder import SpeechDecoder
from speechlm2_jax.speech_decoder.transformer import Transformer
from tests.conversion.goldens import DATA, assert_same_bits
from tests.parity.shared_weights import speech_decoder_tensors

FOLDER = DATA / "speech_decoder"
MODULES = json.loads((FOLDER / "module.json").read_text())
TRANSFORMERS = json.loads((FOLDER / "transformer.json").read_text())
MASK = "self_attention.causal_mask"


def stored(kind: str, name: str) -> dict[str, np.ndarray]:
    tensors = speech_decoder_tensors(f"{kind}_{name}")
    return {k.removeprefix("sd/"): v for k, v in tensors.items() if k.startswith("sd/")}


def module(name: str):
    """(table, infos) of a speech decoder golden."""
    dims = MODULES[name]["dims"]
    config = build(SpeechDecoderConfig, MODULES[name]["config"])
    made = abstract(
        lambda rngs: SpeechDecoder(
            config,
            input_width=dims["latent_dim"],
            codebooks=dims["num_codebooks"],
            codes_per_codebook=dims["tokens_per_codebook"],
            rngs=rngs,
        )
    )
    is_projected = dims["latent_dim"] != config.d_model
    return speech_decoder_table(config, is_projected=is_projected), describe(made)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_come_back_bit_for_bit_without_their_masks(name):
    config = build(SpeechDecoderConfig, TRANSFORMERS[name]["config"])
    infos = describe(abstract(lambda rngs: Transformer(config, rngs=rngs)))
    given, table = stored("transformer", name), transformer_table(config)
    exported = mapping.export(mapping.load(memory_source(given), table, infos), table)
    assert_same_bits(exported, {k: v for k, v in given.items() if MASK not in k})
    assert any(MASK in k for k in given) == config.is_causal


@pytest.mark.parametrize("name", MODULES)
def test_speech_decoders_come_back_bit_for_bit_inside_a_model(name):
    table, infos = module(name)
    table = table.prefixed(source="speech_generation.", target="speech_decoder.")
    infos = {f"speech_decoder.{path}": info for path, info in infos.items()}
    given = {f"speech_generation.{k}": v for k, v in stored("module", name).items()}
    exported = mapping.export(mapping.load(memory_source(given), table, infos), table)
    assert_same_bits(exported, {k: v for k, v in given.items() if MASK not in k})


def test_each_layer_and_codebook_has_its_own_name_to_freeze():
    names = {s.name: s for s in mapping.names(*module("cfg"))}
    assert names["audio_embeddings.2.weight"].layer == 2
    assert names["t5_decoder.layers.1.pos_ff.o_net.conv.weight"].layer == 1
    assert not any(MASK in name for name in names)


def test_another_number_of_codebooks_is_refused_by_name():
    table, infos = module("cfg")
    given = stored("module", "cfg")
    del given["audio_embeddings.2.weight"]
    with pytest.raises(ConversionError, match=r"lacks audio_embeddings\.2\.weight"):
        mapping.load(memory_source(given), table, infos)
