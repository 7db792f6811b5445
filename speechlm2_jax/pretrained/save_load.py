"""Loads and saves whole models: run, saved, NeMo and Hugging Face directories, `.ckpt`."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speechlm2_jax import checkpointing
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.casting import cast_source, main_dtype
from speechlm2_jax.conversion.quantizing import QuantizingPlace
from speechlm2_jax.conversion.readers import lightning_file, open_weights, write_source
from speechlm2_jax.conversion.readers.torch_files import read_hyper_parameters
from speechlm2_jax.layers.module import VariableInfo, Variables
from speechlm2_jax.layers.quantized_layers import unquantized
from speechlm2_jax.pretrained.blueprint import Blueprint
from speechlm2_jax.pretrained.licences import CARD
from speechlm2_jax.pretrained.locate import (
    ASR,
    AUDIO_CODEC,
    GENERATION_CONFIG,
    LLM_BACKBONE,
    Location,
    config_folders,
    read_config_json,
)
from speechlm2_jax.pretrained.merging import merged
from speechlm2_jax.pretrained.model_card import PLACEHOLDER, CardInput, model_card
from speechlm2_jax.pretrained.registry import CONFIG, RUN_DEFINITION
from speechlm2_jax.settings import SettingsError

WEIGHTS = "model.safetensors"
FROZEN_DTYPES = (jnp.bfloat16, jnp.float32)
"""Dtypes in which a run may have stored its frozen parameters."""
MARKERS = {
    "model_type": "nemo_speechlm",
    "architectures": ["NeMoSpeechLMForConditionalGeneration"],
}
"""Keys of config.json that transformers and vLLM look for, as NeMo writes them."""
REDIRECTED = (
    "pretrained_llm",
    "pretrained_asr",
    "pretrained_audio_codec",
    "pretrained_weights",
    "tokenizer_path",
)
"""Keys that loading redirects to the components stored with the weights."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk: its configuration, and how to read its weights."""

    cfg: dict[str, object]
    """Its `model:` block, redirected to the components stored with it."""
    named: dict[str, object]
    """Its `model:` block as saved, with the original names of the components."""
    near: tuple[Path, ...]
    """Directories that relative names are looked up in."""
    read: Callable[[Blueprint, Mapping[str, VariableInfo], "Rebuild", "Layout | None"], Variables]
    """Reads the weights: onto the sharding of each leaf of a layout, else to the host."""


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How a model is written."""

    merge_lora: bool
    """Whether LoRA adapters become part of the weights."""
    dtype: str | None = None
    """Dtype of every floating tensor; None keeps each as it is."""
    name: str = PLACEHOLDER
    """Name on the hub, for the model card."""


Layout = Mapping[str, jax.ShapeDtypeStruct]
"""Dtype and sharding of every variable."""
Rebuild = Callable[[Mapping[str, Any], tuple[Path, ...]], Variables]
"""(settings, folders to look names up in) -> the initial variables of a run with these settings."""


def open_model(name: str) -> ModelSource:
    """Finds a model by path or hub name; reads no weights. Raises SettingsError if incomplete."""
    path = Location().find(name, key="pretrained_name")
    if path.is_dir() and (path / "checkpoints").is_dir():
        folder = run_definition(path)
        named = _saved_cfg(folder)
        return ModelSource(
            cfg=_redirected(named, folder),
            named=named,
            near=(folder,),
            read=lambda _, infos, rebuild, layout: _read_run(path, infos, rebuild, layout),
        )
    lightning = None if (path / CONFIG).is_file() else lightning_file(path)
    if lightning is not None:
        cfg = read_hyper_parameters(lightning).get("cfg")
        if not isinstance(cfg, dict):
            raise SettingsError(f"{path}: its hyper_parameters have no cfg of a speech model")
        folder = path.parent
        redirected = _redirected(cfg, None)
        return ModelSource(cfg=redirected, named=cfg, near=(folder,), read=_reader(path))
    if not path.is_dir():
        raise SettingsError(
            f"{path}: expected a run directory, a saved or NeMo model directory, or a .ckpt"
        )
    named = _saved_cfg(path)
    return ModelSource(
        cfg=_redirected(named, path), named=named, near=(path, path.parent), read=_reader(path)
    )


def run_definition(run: Path) -> Path:
    """The folder of a run with everything of its model but the weights.

    Raises DamagedError if a file in it has changed since the run wrote it, and if the list of
    their checksums is missing but the steps of the run have such lists.
    """
    folder = run / RUN_DEFINITION
    checkpointing.verify_listed(
        folder,
        "resume the run to write it again, or, if you changed the folder, write the word unchecked "
        "into checksums.xxh3 there",
        is_expected=checkpointing.has_checksums(run),
    )
    return folder


def save_definition(directory: Path, blueprint: Blueprint) -> None:
    """Writes config.json, the tokenizer, and the config of each component in its own folder.

    The folder of the LLM also holds its generation_config.json, if it has one.

    config.json has the user's original names of the components. Their paths need not exist where
    the directory is read: loading uses the configs in the directory.
    """
    for name, config in blueprint.component_configs().items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        write_json(directory / name / CONFIG, config)
    for name, content in blueprint.component_files().items():
        (directory / name).write_bytes(content)
    if blueprint.generation_config is not None:
        write_json(directory / LLM_BACKBONE / GENERATION_CONFIG, blueprint.generation_config)
    cfg = dict(blueprint.cfg)
    if blueprint.named is not None:
        cfg = {k: v for k, v in cfg.items() if k not in REDIRECTED}
        cfg |= {k: v for k, v in blueprint.named.items() if k in REDIRECTED}
    cfg.pop("init_from_checkpoint", None)  # its weights are already loaded; NeMo would look for it
    write_json(directory / CONFIG, {**cfg, **MARKERS})
    blueprint.tokenizer.save(directory)


def save_model(
    directory: Path, blueprint: Blueprint, variables: Variables, options: SaveOptions
) -> None:
    """Writes model.safetensors under NeMo's names, the definition and a model card."""
    lora = blueprint.network.lora
    if options.merge_lora:
        blueprint, variables = merged(blueprint, variables, options.dtype)
    source = cast_source(mapping.export_source(variables, blueprint.table), options.dtype)
    write_source(directory / WEIGHTS, source, mapping.aliases(blueprint.table, variables))
    save_definition(directory, blueprint)
    card = CardInput(
        blueprint=blueprint,
        variables=variables,
        dtype=main_dtype(source),
        merged=lora if options.merge_lora else None,
        name=options.name,
    )
    (directory / CARD).write_text(model_card(card), encoding="utf-8")


def _saved_cfg(directory: Path) -> dict[str, Any]:
    """NeMo's config.json of a speech model."""
    cfg = read_config_json(directory / CONFIG, key="pretrained_name")
    if "pretrained_llm" not in cfg or "perception" not in cfg:
        raise SettingsError(
            f"{directory / CONFIG} is not the config of a speech model (it has no pretrained_llm "
            "or no perception); name a plain LLM in model.pretrained_llm of a training config"
        )
    return cfg


def _redirected(named: Mapping[str, object], directory: Path | None) -> dict[str, Any]:
    """The configuration, redirected to the tokenizer and the component configs in `directory`."""
    cfg = {**named, "pretrained_weights": False}
    cfg.pop("init_from_checkpoint", None)
    if directory is None:
        return cfg
    if (directory / "tokenizer_config.json").is_file():
        cfg["tokenizer_path"] = str(directory)
    for key, folder in (
        ("pretrained_llm", LLM_BACKBONE),
        ("pretrained_asr", ASR),
        ("pretrained_audio_codec", AUDIO_CODEC),
    ):
        if (directory / folder / CONFIG).is_file():
            cfg[key] = str(directory / folder)
    return cfg


def _read_run(
    run: Path, infos: Mapping[str, VariableInfo], rebuild: Rebuild, layout: Layout | None
) -> Variables:
    """The weights of a run; damaged frozen ones are rebuilt from their pretrained source."""

    def rebuild_frozen(
        settings: Mapping[str, object], known: frozenset[str]
    ) -> Iterator[dict[str, np.ndarray]]:
        variables = rebuild(settings, (run, *config_folders()))
        is_own = infos.keys() <= variables.keys()  # else the run itself is not quantized
        stored = infos if is_own else unquantized(infos)
        for dtype in FROZEN_DTYPES:
            yield {
                path: np.asarray(value, stored[path].computed_in(dtype))
                for path, value in variables.items()
                if path not in known
            }

    variables: Variables = dict(
        checkpointing.load_weights(run, rebuild_frozen=rebuild_frozen).variables
    )
    place = QuantizingPlace(infos, layout)
    return place.all(variables) | place.scales


def _reader(
    path: Path,
) -> Callable[[Blueprint, Mapping[str, VariableInfo], Rebuild, Layout | None], Variables]:
    def read(
        blueprint: Blueprint,
        infos: Mapping[str, VariableInfo],
        rebuild: Rebuild,
        layout: Layout | None,
    ) -> Variables:
        place = QuantizingPlace(infos, layout)
        read = mapping.load(open_weights(path), blueprint.table, unquantized(infos), place)
        return read | place.scales

    return read


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes a JSON object with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
