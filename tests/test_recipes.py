"""The recipes of real size: only the data is missing, every key counts, and so many parameters."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechlm2_jax import experiment, settings
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.data.datamodule import DataModule
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.training.exp_manager import ExpManagerConfig
from speechlm2_jax.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
RECIPE_FOLDER = ROOT / "configs/recipes"
MANIFEST = DATA / "manifests/manifest.jsonl"
LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
"""TinyLlama/TinyLlama_v1.1."""
QWEN = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
"""Qwen/Qwen3-1.7B."""
CANARY = {
    "preprocessor": {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": 16000,
        "normalize": "per_feature",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": 128,
        "n_fft": 512,
        "dither": 1e-5,
        "pad_to": 0,
    },
    "encoder": {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": 128,
        "feat_out": -1,
        "n_layers": 32,
        "d_model": 1024,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "subsampling_conv_channels": 256,
        "causal_downsampling": False,
        "ff_expansion_factor": 4,
        "self_attention_model": "rel_pos",
        "n_heads": 8,
        "att_context_size": [-1, -1],
        "xscaling": False,
        "untie_biases": True,
        "conv_kernel_size": 9,
        "conv_norm_type": "batch_norm",
        "conv_context_size": None,
        "dropout": 0.1,
        "dropout_att": 0.1,
    },
}
"""nvidia/canary-1b-flash."""


@dataclass(frozen=True)
class Recipe:
    name: str
    llm: dict[str, Any]
    tokenizer: str
    val: str
    counts: dict[str, int]
    """Parameters of each part."""
    trained: frozenset[str]
    """The parts that are trained, wholly; the others are frozen, wholly."""

    def values(self, tmp_path: Path, manifest: Path = MANIFEST) -> dict[str, Any]:
        """The recipe's settings, over parts of the real shapes that hold no weights."""
        (tmp_path / "llm").mkdir()
        (tmp_path / "llm/config.json").write_text(json.dumps(self.llm))
        write_nemo(tmp_path / "asr.nemo", CANARY, {}, {})
        return settings.load(
            RECIPE_FOLDER / f"{self.name}.yaml",
            [
                f"model.pretrained_llm={tmp_path / 'llm'}",
                f"model.pretrained_asr={tmp_path / 'asr.nemo'}",
                f"+model.tokenizer_path={ROOT / self.tokenizer}",
                f"data.train_ds.input_cfg.0.cuts_path={manifest}",
                f"data.validation_ds.datasets.{self.val}.input_cfg.0.cuts_path={manifest}",
            ],
        )


CANARY_ENCODER = 810_984_448
PROJECTION = 1024 * 2048 + 2048
RECIPES = [
    Recipe(
        name="canary_qwen_2.5b",
        llm=QWEN,
        tokenizer="tests/data/llm/qwen3",
        val="val",
        counts={
            "llm": 1_720_574_976,
            "encoder": CANARY_ENCODER,
            "projection": PROJECTION,
            "lora": 28 * 128 * ((2048 + 2048) + (2048 + 1024)),
        },
        trained=frozenset({"encoder", "projection", "lora"}),
    ),
    Recipe(
        name="salm_tinyllama",
        llm=LLAMA,
        tokenizer="tests/data/llm/llama",
        val="val_set_0",
        counts={
            "llm": 1_100_048_384,
            "encoder": CANARY_ENCODER,
            "adapter": 51_465_216,
            "projection": PROJECTION,
        },
        trained=frozenset({"adapter", "projection"}),
    ),
]
BY_NAME = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def part(path: str) -> str:
    """The part of a SALM that a variable belongs to."""
    if path.endswith((".lora_a", ".lora_b")):
        return "lora"
    return path.split(".")[1] if path.startswith("perception.") else "llm"


def parameters(model: SALM) -> dict[str, int]:
    """Counts the parameters of each part."""
    counts: dict[str, int] = {}
    for path, info in model.infos.items():
        if not info.is_buffer:
            counts[part(path)] = counts.get(part(path), 0) + math.prod(info.shape)
    return counts


@BY_NAME
def test_the_model_has_and_trains_the_parameters_that_its_recipe_states(recipe, tmp_path):
    model = SALM(recipe.values(tmp_path)["model"])
    assert parameters(model) == recipe.counts
    for path, is_trained in model.trainable.items():
        assert np.all(np.asarray(is_trained) == (part(path) in recipe.trained)), path
    assert model._variables is None, "no array may be made of a model that is only described"


@BY_NAME
def test_every_key_is_known_and_means_something_here(recipe, tmp_path):
    values = recipe.values(tmp_path)
    with settings.ignored_report() as ignored:
        experiment.check_blocks(values)
        model = SALM(values["model"])
        Trainer(**values["trainer"]).check(model)
        settings.build(ExpManagerConfig, values["exp_manager"], "exp_manager")
        datamodule = DataModule(values["data"], model.tokenizer)
    assert not ignored
    datamodule.setup(frame_count=model.frame_count, groups=8)
    assert not datamodule.dropped


@BY_NAME
def test_only_the_data_is_left_to_fill_in(recipe):
    path = RECIPE_FOLDER / f"{recipe.name}.yaml"
    with pytest.raises(settings.SettingsError) as error:
        settings.require_complete(settings.load(path, complete=False))
    missing = str(error.value).removeprefix("fill in ").split(";")[0].split(", ")
    assert missing == [
        "data.train_ds.input_cfg.0.cuts_path",
        f"data.validation_ds.datasets.{recipe.val}.input_cfg.0.cuts_path",
    ]


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted paths and their values, lists taken whole but for lists of mappings."""
    items: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        items = list(enumerate(node))
    if not items:
        return {path: node}
    return {p: v for k, x in items for p, v in leaves(x, f"{path}.{k}".lstrip(".")).items()}


OF_OUR_OWN = {
    "trainer.accelerator",
    "data.train_ds.num_workers",
    "exp_manager.explicit_log_dir",
    "exp_manager.create_tensorboard_logger",
    "exp_manager.max_time_per_run",
}
FREE = ("exp_manager.wandb_logger_kwargs.", "model.lora.", "data.train_ds.input_cfg.")
FREE += ("data.validation_ds.datasets.val_set_0.input_cfg.",)


def test_salm_tinyllama_has_nemos_values():
    lines = (DATA / "from_nemo/salm.txt").read_text().splitlines()
    nemo = leaves(settings.resolve(settings.override({}, [f"+{line}" for line in lines if line])))
    ours = leaves(settings.load(RECIPE_FOLDER / "salm_tinyllama.yaml", complete=False))
    shared = {key for key in ours.keys() & nemo.keys() if not key.startswith(FREE)}
    assert {key for key in shared if ours[key] != nemo[key]} == OF_OUR_OWN
    assert not {key for key in ours.keys() - nemo.keys() if not key.startswith(FREE)}


@BY_NAME
def test_the_page_states_what_the_recipes_cost(recipe):
    page = (ROOT / "docs/recipes.md").read_text()
    counts = recipe.counts
    trained = sum(count for name, count in counts.items() if name in recipe.trained)
    frozen = sum(counts.values()) - trained
    for count in (*counts.values(), trained, frozen):
        assert f"{count:,}" in page, f"{count:,}"
    whole = 16 * trained + 2 * frozen
    assert f"{whole / 1e9:.1f} GB" in page, f"{whole / 1e9:.1f} GB on every device"
    assert f"{whole / 8e9:.1f} GB" in page, f"{whole / 8e9:.1f} GB on each of eight"
