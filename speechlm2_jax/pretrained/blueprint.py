"""`Blueprint`: everything of a model but its weights; and how the weights are initialized."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx

from speechlm2_jax.conversion import hf_config, mapping
from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.conversion.stream_to_mesh import onto
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import VariableInfo, Variables, split
from speechlm2_jax.layers.stack import Remat
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.parameter_paths import NamedSlice
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.pretrained import initial_weights
from speechlm2_jax.pretrained.locate import LLM_BACKBONE
from speechlm2_jax.settings import SettingsError, build, to_plain

B = TypeVar("B", bound="Blueprint")
ASR_BLOCKS = ("preprocessor", "encoder")
PretrainedWeights = tuple[mapping.TensorSource, mapping.Table, dict[str, VariableInfo]]
"""(tensors of a component, its table of names, the variables that they fill)."""


class ModelConfig(Protocol):
    """The keys of every `model:` block that builds on a pretrained LLM."""

    @property
    def pretrained_weights(self) -> bool:
        """Whether the components give weights too, or their architecture alone."""
        ...

    @property
    def freeze_params(self) -> tuple[str, ...]:
        """Patterns of parameter names that are frozen."""
        ...

    @property
    def prevent_freeze_params(self) -> tuple[str, ...]:
        """Patterns that override `freeze_params`."""
        ...

    @property
    def lora(self) -> Mapping[str, Any] | None:
        """NeMo's `lora` block."""
        ...

    @property
    def optimizer(self) -> Mapping[str, Any] | None:
        """NeMo's `optimizer` block."""
        ...

    @property
    def lr_scheduler(self) -> Mapping[str, Any] | None:
        """NeMo's `lr_scheduler` block."""
        ...

    @property
    def nemo_exact(self) -> bool:
        """Whether results that depend on NeMo's own padding are reproduced."""
        ...

    @property
    def init_from_checkpoint(self) -> str | None:
        """A model whose weights override all others."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the random initialization."""
        ...


class NetworkConfig(Protocol):
    """What every architecture with an LLM has."""

    @property
    def llm(self) -> DecoderConfig:
        """The LLM."""
        ...

    @property
    def perception(self) -> PerceptionConfig:
        """The audio encoder with its adapter."""
        ...

    @property
    def lora(self) -> LoraConfig | None:
        """LoRA adapters of the LLM."""
        ...

    @property
    def compute_dtype(self) -> str:
        """Dtype of activations."""
        ...

    @property
    def remat(self) -> Remat:
        """What the backward pass recomputes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Blueprint(ABC):
    """Everything of a model but its weights."""

    config: Any
    """The `model:` block as read (`ModelConfig`)."""
    cfg: Mapping[str, Any]
    """The `model:` block with the architecture of every component filled in."""
    llm_config: Mapping[str, Any]
    """The LLM's config.json, unchanged."""
    tokenizer: Tokenizer
    pad_id: int
    network: Any
    """The architecture (`NetworkConfig`)."""
    llm_directory: Path
    asr_file: Path | None
    near: tuple[Path, ...] = ()
    """Further directories that relative names are looked up in, after the working directory."""
    named: Mapping[str, Any] | None = None
    """`cfg` as stored in the directory that the model was loaded from; None for a new model."""

    @property
    @abstractmethod
    def table(self) -> mapping.Table:
        """NeMo's parameter names of the whole model."""

    @abstractmethod
    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the network."""

    @abstractmethod
    def pretrained(self, infos: Mapping[str, VariableInfo]) -> Iterator[PretrainedWeights]:
        """The pretrained weights of each component."""

    def component_configs(self) -> dict[str, Mapping[str, Any]]:
        """Configs of the components, by their folder in a saved model."""
        return {LLM_BACKBONE: self.llm_config}

    def with_network(self: B, **changes: Any) -> B:
        """The same model with another `compute_dtype` or `remat`."""
        return replace(self, network=replace(self.network, **changes))


def parameter_names(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> list[NamedSlice]:
    """NeMo's name for every slice of every variable, for freeze patterns."""
    return mapping.names(blueprint.table, infos)


def state_dict(blueprint: Blueprint, variables: Variables) -> dict[str, np.ndarray]:
    """Variables under NeMo's parameter names, without aliases."""
    host = {path: np.asarray(value) for path, value in variables.items()}
    return mapping.export(host, blueprint.table)


def load_or_initialize(
    blueprint: Blueprint,
    infos: Mapping[str, VariableInfo],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Variables:
    """Loads the pretrained weights and initializes the rest at random.

    Weights of `init_from_checkpoint` override both. With `layout` each variable is streamed to the
    sharding of its leaf; without, variables stay on the host.
    """
    place = None if layout is None else onto(layout)
    name = blueprint.config.init_from_checkpoint
    if name is None:
        return _load_components(blueprint, infos, layout, {})
    path = initial_weights.find(name, blueprint.near)
    first = initial_weights.match(path, blueprint.table, infos)
    first.log()
    given = first.load(infos, place)
    variables = _load_components(blueprint, infos, layout, given)
    return variables | first.overlay(variables, given)


def _load_components(
    blueprint: Blueprint,
    infos: Mapping[str, VariableInfo],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None,
    given: Variables,
) -> Variables:
    """Variables that are `given`, then the pretrained components', then random ones."""
    place = None if layout is None else onto(layout)
    loaded = dict(given)
    for source, table, wanted in blueprint.pretrained(infos):
        if wanted.keys() - given.keys():
            loaded = mapping.load(source, table, wanted, place) | loaded
    missing = frozenset(infos) - frozenset(loaded)
    return loaded | random_variables(blueprint, missing, layout)


def check_weights(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> None:
    """Compares names and shapes of the pretrained weights with the model's; reads no value.

    Raises ConversionError or SettingsError for weights that are missing or do not fit.
    """
    for source, table, wanted in blueprint.pretrained(infos):
        mapping.check(source, table, wanted)
    name = blueprint.config.init_from_checkpoint
    if name is not None:
        initial_weights.check(initial_weights.find(name, blueprint.near), blueprint.table, infos)


def random_variables(
    blueprint: Blueprint,
    paths: frozenset[str],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Variables:
    """Initializes the variables of these paths at random, and no others."""

    def make() -> Variables:
        variables = split(blueprint.make(nnx.Rngs(blueprint.config.seed)))[1]
        return {path: value for path, value in variables.items() if path in paths}

    return draw(make, layout)


def infos_below(
    prefix: str, infos: Mapping[str, VariableInfo], without: tuple[str, ...] = ()
) -> dict[str, VariableInfo]:
    """The variables whose path starts with a prefix, without those that end in one of `without`."""
    return {
        path: info
        for path, info in infos.items()
        if path.startswith(prefix) and not path.endswith(without or ("\0",))
    }


def perception_config(
    block: Mapping[str, Any], asr_file: Path | None, llm_width: int
) -> tuple[dict[str, Any], PerceptionConfig]:
    """The perception block; keys that the user leaves out come from the ASR model."""
    merged = dict(block)
    asr = {} if asr_file is None else read_nemo(asr_file).config
    for name in ASR_BLOCKS:
        own = {k: v for k, v in (merged.get(name) or {}).items() if v is not None}
        if name in asr:
            # NeMo: the user's encoder keys override; the preprocessor is the ASR model's
            merged[name] = {**asr[name], **(own if name == "encoder" else {})}
        elif not own:
            raise SettingsError(
                f"model.perception.{name}: required without model.pretrained_asr; write the block, "
                "or set model.pretrained_asr to a .nemo file"
            )
    # as in NeMo, the output width of perception is the LLM's, whatever the YAML has
    merged["output_dim"] = llm_width
    adapter = merged.get("modality_adapter")
    if isinstance(adapter, Mapping) and adapter.get("output_dim") is not None:
        merged["modality_adapter"] = {**adapter, "output_dim": llm_width}
    return merged, build(PerceptionConfig, merged, "model.perception")


def normalized(
    kind: type[Any],
    settings: Mapping[str, Any],
    component_configs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A `model:` block with all defaults, without ignored keys.

    The architecture of the LLM (its config.json among `component_configs`) is under `llm`. Raises
    ValueError for a block of another kind of model.
    """
    block: dict[str, Any] = to_plain(build(kind, settings, "model"))
    for key, config in (("perception", PerceptionConfig), ("lora", LoraConfig)):
        if settings.get(key) is not None:
            block[key] = to_plain(build(config, settings[key], f"model.{key}"))
    if LLM_BACKBONE in component_configs:
        block["llm"] = to_plain(hf_config.decoder_config(component_configs[LLM_BACKBONE]))
    return block


def needs_asr(pretrained_weights: bool, perception: Mapping[str, Any]) -> bool:
    """Whether the ASR model is needed, for its weights or its preprocessor or encoder block."""
    return pretrained_weights or any(b not in perception for b in ASR_BLOCKS)
