"""Whole models in and out: run directories, saved, NeMo and Hugging Face directories, `.ckpt`."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from speechlm2_jax import checkpointing
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.casting import cast
from speechlm2_jax.conversion.readers import open_weights, write_safetensors
from speechlm2_jax.conversion.readers.torch_files import read_hyper_parameters
from speechlm2_jax.layers.module import VariableInfo, Variables
from speechlm2_jax.pretrained.blueprint import Blueprint, state_dict
from speechlm2_jax.pretrained.locate import (
    AUDIO_CODEC,
    LLM_BACKBONE,
    Location,
    config_folders,
    read_json,
)
from speechlm2_jax.pretrained.registry import CONFIG, RUN_DEFINITION
from speechlm2_jax.settings import SettingsError

WEIGHTS = "model.safetensors"
FROZEN_DTYPES = (jnp.bfloat16, jnp.float32)
"""In which a run keeps frozen parameters."""
MARKERS = {
    "model_type": "nemo_speechlm",
    "architectures": ["NeMoSpeechLMForConditionalGeneration"],
}
"""What transformers and vLLM look for in config.json, as NeMo writes it."""


POINTED = ("pretrained_llm", "pretrained_audio_codec", "pretrained_weights", "tokenizer_path")
"""Keys that loading changes: components are read from beside the weights."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found: its configuration, and how to read its weights."""

    cfg: dict[str, Any]
    """Its `model:` block, pointed at what lies beside it."""
    named: dict[str, Any]
    """The same as it was saved: what the components were made from, wherever that was."""
    near: tuple[Path, ...]
    read: Callable[[Blueprint, Mapping[str, VariableInfo], "Again"], Variables]


Again = Callable[[Mapping[str, Any], tuple[Path, ...]], Variables]
"""Makes the variables that a new run with these settings would start from, its parts found in the
working folder or in those named."""


def open_model(name: str) -> ModelSource:
    """Finds what `name` means, reading no weights. Raises SettingsError with what is missing."""
    path = Location().find(name, key="pretrained_name")
    if path.is_dir() and (path / "checkpoints").is_dir():
        graphdef = run_definition(path)
        named = _saved_cfg(graphdef)
        return ModelSource(
            cfg=_pointed(named, graphdef),
            named=named,
            near=(graphdef,),
            read=lambda _, infos, again: _read_run(path, infos, again),
        )
    if path.suffix == ".ckpt":
        cfg = read_hyper_parameters(path).get("cfg")
        if not isinstance(cfg, dict):
            raise SettingsError(f"{path}: its hyper_parameters hold no cfg of a speech model")
        folder = path.parent
        pointed = _pointed(cfg, None)
        return ModelSource(cfg=pointed, named=cfg, near=(folder,), read=_reader(path))
    if not path.is_dir():
        raise SettingsError(
            f"{path}: expected a run directory, a saved or NeMo model directory, or a .ckpt file"
        )
    named = _saved_cfg(path)
    return ModelSource(
        cfg=_pointed(named, path), named=named, near=(path, path.parent), read=_reader(path)
    )


def run_definition(run: Path) -> Path:
    """The folder of a run that holds all of its model but the weights.

    Raises DamagedError if a file in it is not the one that the run wrote.
    """
    graphdef = run / RUN_DEFINITION
    checkpointing.verify_listed(
        graphdef,
        "resume the run to have it written again, or delete checksums.xxh3 there if the change is "
        "yours",
    )
    return graphdef


def save_definition(directory: Path, blueprint: Blueprint) -> None:
    """Writes config.json, the tokenizer, and the config of each part in a folder of its own.

    config.json names what the components were made from as the user did. A path in it need not
    exist where the directory is read: what the directory holds comes first.
    """
    for name, config in blueprint.definitions().items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        _write_json(directory / name / CONFIG, config)
    cfg = dict(blueprint.cfg)
    if blueprint.named is not None:
        cfg = {k: v for k, v in cfg.items() if k not in POINTED}
        cfg |= {k: v for k, v in blueprint.named.items() if k in POINTED}
    cfg.pop("init_from_checkpoint", None)  # the weights are here; NeMo would look for it
    _write_json(directory / CONFIG, {**cfg, **MARKERS})
    blueprint.tokenizer.save(directory)


def save_model(
    directory: Path, blueprint: Blueprint, variables: Variables, dtype: str | None = None
) -> None:
    """Writes the definition and model.safetensors under NeMo's names, if asked in `dtype`."""
    tensors = cast(state_dict(blueprint, variables), dtype)
    save_definition(directory, blueprint)
    write_safetensors(directory / WEIGHTS, tensors, mapping.aliases(blueprint.table))


def _saved_cfg(directory: Path) -> dict[str, Any]:
    """NeMo's config.json of a speech model."""
    cfg = read_json(directory / CONFIG, key="pretrained_name")
    if "pretrained_llm" not in cfg or "perception" not in cfg:
        raise SettingsError(
            f"{directory / CONFIG} describes no speech model (it lacks pretrained_llm or "
            "perception); a plain LLM goes to model.pretrained_llm of a training configuration"
        )
    return cfg


def _pointed(named: Mapping[str, Any], directory: Path | None) -> dict[str, Any]:
    """The configuration pointed at the tokenizer and the parts' configs in `directory`, if any."""
    cfg = {**named, "pretrained_weights": False}
    cfg.pop("init_from_checkpoint", None)
    if directory is None:
        return cfg
    if (directory / "tokenizer_config.json").is_file():
        cfg["tokenizer_path"] = str(directory)
    for key, folder in (("pretrained_llm", LLM_BACKBONE), ("pretrained_audio_codec", AUDIO_CODEC)):
        if (directory / folder / CONFIG).is_file():
            cfg[key] = str(directory / folder)
    return cfg


def _read_run(run: Path, infos: Mapping[str, VariableInfo], again: Again) -> Variables:
    """The weights of a run; frozen ones from their pretrained source if their store is damaged."""

    def rebuild(settings: Mapping[str, Any], known: frozenset[str]) -> Iterator[Variables]:
        variables = again(settings, (run, *config_folders()))
        for dtype in FROZEN_DTYPES:
            yield {
                path: np.asarray(value, infos[path].computed_in(dtype))
                for path, value in variables.items()
                if path not in known
            }

    return dict(checkpointing.load_weights(run, rebuild_frozen=rebuild).variables)


def _reader(path: Path) -> Callable[[Blueprint, Mapping[str, VariableInfo], Again], Variables]:
    def read(blueprint: Blueprint, infos: Mapping[str, VariableInfo], again: Again) -> Variables:
        return mapping.load(open_weights(path), blueprint.table, infos)

    return read


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
