"""A tied LLM whose file stores embedding and head: loads where both are equal, else is named."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.readers import memory_source, open_weights, write_safetensors
from speechlm2_jax.conversion.salm import salm_table
from speechlm2_jax.conversion.stream_to_mesh import onto
from speechlm2_jax.conversion.writers.torch_files import write_torch_file
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.models import SALM, DuplexS2SModel
from speechlm2_jax.pretrained import duplex
from speechlm2_jax.pretrained.duplex_config import DuplexModelConfig
from speechlm2_jax.sharding import make_sharding
from tests.conversion.goldens import assert_same_bits, salm_config, salm_infos, tensors

QWEN3 = Path(__file__).parents[1] / "data/llm/qwen3"
DUPLEX = Path(__file__).parents[1] / "data/duplex"
SALM_SAVED = Path(__file__).parents[1] / "data/salm/qwen3_lora_hf"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = decoder_config(json.loads((QWEN3 / "config.json").read_text()))
INFOS = describe(abstract(lambda rngs: Decoder(CONFIG, rngs=rngs)))


def stored() -> dict[str, np.ndarray]:
    return tensors(open_weights(QWEN3))


def load(source, place=None):
    return mapping.load(source, decoder_table(CONFIG), INFOS, place)


def write_sharded(folder: Path, weights: dict[str, np.ndarray], suffix: str) -> None:
    """Embedding and head in the first and the last of three files, everything else between."""
    parts = [
        {EMBEDDING: weights[EMBEDDING]},
        {k: v for k, v in weights.items() if k not in (EMBEDDING, HEAD)},
        {HEAD: weights[HEAD]},
    ]
    places = {}
    for n, part in enumerate(parts, start=1):
        name = f"part-{n}.{suffix}"
        write = write_safetensors if suffix == "safetensors" else write_torch_file
        write(folder / name, part)
        places |= dict.fromkeys(part, name)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("layout", ["one file", "safetensors", "bin"])
def test_equal_copies_load_in_one_file_and_in_shards(tmp_path, layout):
    expected = load(open_weights(QWEN3))
    weights = {**stored(), HEAD: stored()[EMBEDDING].copy()}
    if layout == "one file":
        write_safetensors(tmp_path / "model.safetensors", weights)
    else:
        write_sharded(tmp_path, weights, layout)
    assert_same_bits(load(open_weights(tmp_path)), expected)


def test_equal_copies_load_onto_a_mesh(tmp_path):
    write_safetensors(
        tmp_path / "model.safetensors", {**stored(), HEAD: stored()[EMBEDDING].copy()}
    )
    sharding = make_sharding(fsdp=4, tensor=2)
    layout = {
        path: jax.ShapeDtypeStruct(
            info.shape, info.dtype, sharding=sharding.named(info.axes, info.shape)
        )
        for path, info in INFOS.items()
    }
    placed = load(open_weights(tmp_path), onto(layout))
    assert_same_bits({k: np.asarray(v) for k, v in placed.items()}, load(open_weights(QWEN3)))


def test_copies_that_differ_are_refused_with_the_setting_that_decides(tmp_path):
    head = stored()[EMBEDDING].copy()
    head[17, 3] += 1
    write_safetensors(tmp_path / "model.safetensors", {**stored(), HEAD: head})
    with pytest.raises(
        ConversionError, match=r"embed_tokens.*lm_head.*first in row 17 .*tie_word_embeddings"
    ):
        load(open_weights(tmp_path))
    fewer_rows = {**stored(), HEAD: head[:-5]}
    with pytest.raises(ConversionError, match="shapes"):
        load(memory_source(fewer_rows))


def test_copies_that_are_equal_after_one_cast_load_with_the_embedding():
    rounded = stored()[EMBEDDING].astype(ml_dtypes.bfloat16)
    variables = load(memory_source({**stored(), HEAD: rounded}))
    assert variables["embedding.weight"].dtype == np.float32
    variables = load(memory_source({**stored(), EMBEDDING: rounded, HEAD: stored()[EMBEDDING]}))
    assert variables["embedding.weight"].tobytes() == rounded.tobytes()
    rounded[-1, -1] += 1
    with pytest.raises(ConversionError, match="first in row 340"):
        load(memory_source({**stored(), HEAD: rounded}))


def test_every_place_of_a_nemo_checkpoint_may_hold_a_copy():
    config = salm_config("qwen3_lora")
    weights = tensors(open_weights(SALM_SAVED))
    expected = mapping.load(memory_source(weights), salm_table(config), salm_infos(config))
    copies = {
        name: weights["embed_tokens.weight"].copy()
        for name in (
            "llm.base_model.model.lm_head.weight",
            "llm.base_model.model.model.embed_tokens.weight",
            "lm_head.weight",
        )
    }
    several = memory_source({**weights, **copies})
    assert_same_bits(mapping.load(several, salm_table(config), salm_infos(config)), expected)
    copies["lm_head.weight"][5] = 0
    with pytest.raises(ConversionError, match=r"lm_head\.weight.*tie_word_embeddings"):
        mapping.load(memory_source({**weights, **copies}), salm_table(config), salm_infos(config))


@pytest.mark.slow
def test_a_saved_salm_that_stores_both_loads(tmp_path):
    model = SALM.from_pretrained(str(SALM_SAVED))
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    source = open_weights(file)
    both = tensors(source) | {name: source.read(kept) for name, kept in source.aliases.items()}
    assert len(both) > len(source.infos)
    write_safetensors(file, both)
    assert_same_bits(
        dict(SALM.from_pretrained(str(tmp_path / "saved")).variables), dict(model.variables)
    )


def tied_duplex_llm(folder: Path) -> dict[str, np.ndarray]:
    """Writes the duplex models' LLM as a tied one that stores both copies; gives its tensors."""
    shutil.copytree(DUPLEX / "assets/llm", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = tensors(open_weights(folder))
    weights[HEAD] = weights[EMBEDDING].copy()
    write_safetensors(folder / "model.safetensors", weights)
    return weights


def test_every_place_of_a_tied_duplex_checkpoint_is_known(tmp_path):
    tied_duplex_llm(tmp_path / "llm")
    cfg = json.loads((DUPLEX / "duplex_s2s/cfg_input.json").read_text())
    cfg["pretrained_llm"] = str(tmp_path / "llm")
    table = duplex.read_blueprint(DuplexModelConfig, cfg, (DUPLEX,)).table
    (rule,) = [rule for rule in table.rules if rule.target == "llm.embedding.weight"]
    places = ("embed_tokens.weight", "lm_head.weight", "llm.embed_tokens.weight")
    assert rule.accepted(None) == places
    assert "tie_word_embeddings" in rule.where_copies_differ


@pytest.mark.slow
def test_a_tied_duplex_model_may_store_every_copy(tmp_path):
    weights = tied_duplex_llm(tmp_path / "llm")
    cfg = json.loads((DUPLEX / "duplex_s2s/cfg_input.json").read_text())
    model = DuplexS2SModel({**cfg, "pretrained_llm": str(tmp_path / "llm")}, near=(DUPLEX,))
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/model.safetensors"
    copies = {
        name: weights[EMBEDDING].copy() for name in ("lm_head.weight", "llm.embed_tokens.weight")
    }
    write_safetensors(file, tensors(open_weights(file)) | copies)
    again = DuplexS2SModel.from_pretrained(str(tmp_path / "saved"))
    assert_same_bits(
        {path: np.asarray(x) for path, x in again.variables.items()},
        {path: np.asarray(x) for path, x in model.variables.items()},
    )
