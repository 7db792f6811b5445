"""`Blueprint`: everything of a model but its weights; and how the weights are initialized."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from flax import nnx

from speechlm2_jax.conversion import hf_config, mapping
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.perception import asr_table
from speechlm2_jax.conversion.quantizing import QuantizingPlace, dequantized
from speechlm2_jax.conversion.readers import open_weights
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import VariableInfo, Variables, split
from speechlm2_jax.layers.quantized_layers import unquantized
from speechlm2_jax.layers.stack import Remat
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.parameter_paths import NamedSlice
from speechlm2_jax.perception.perception import PerceptionConfig
from speechlm2_jax.pretrained import initial_weights
from speechlm2_jax.pretrained.components import ModelConfig, lora_class
from speechlm2_jax.pretrained.llm_files import llm_generation_config, llm_weights
from speechlm2_jax.pretrained.locate import LLM_BACKBONE
from speechlm2_jax.settings import build, to_plain

B = TypeVar("B", bound="Blueprint")
PretrainedWeights = tuple[mapping.TensorSource, mapping.Table, dict[str, VariableInfo]]
"""(tensors of a component, its table of names, the variables that they fill)."""


@runtime_checkable
class NetworkConfig(Protocol):
    """What every architecture with an LLM has. It is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field]]

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

    config: ModelConfig
    """The `model:` block as read (`ModelConfig`)."""
    cfg: Mapping[str, object]
    """The `model:` block with the architecture of every component filled in."""
    llm_config: Mapping[str, object]
    """The LLM's config.json, unchanged."""
    tokenizer: Tokenizer
    pad_id: int
    network: NetworkConfig
    """The architecture (`NetworkConfig`)."""
    llm_directory: Path
    """A Hugging Face directory, or a GGUF file."""
    asr_file: Path | None
    near: tuple[Path, ...] = ()
    """Further directories that relative names are looked up in, after the working directory."""
    named: Mapping[str, object] | None = None
    """`cfg` as stored in the directory that the model was loaded from; None for a new model."""
    origin: Path | None = None
    """The run, directory or file that the model was loaded from; None for a new model."""

    @property
    @abstractmethod
    def table(self) -> mapping.Table:
        """NeMo's parameter names of the whole model."""

    @abstractmethod
    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the network."""

    def pretrained(self, infos: Mapping[str, VariableInfo]) -> Iterator[PretrainedWeights]:
        """The pretrained weights of each component: the LLM and the ASR model."""
        if not self.config.pretrained_weights:
            return
        yield (
            llm_weights(self.llm_directory),
            decoder_table(self.network.llm).prefixed(target="llm."),
            infos_below("llm.", infos, without=("lora_a", "lora_b")),
        )
        if self.asr_file is not None:
            yield self.pretrained_asr(self.asr_file, infos)

    def pretrained_asr(self, file: Path, infos: Mapping[str, VariableInfo]) -> PretrainedWeights:
        """What the model has of an ASR model: the encoder and its filters."""
        return (
            open_weights(file),
            asr_table(self.network.perception).prefixed(target="perception."),
            infos_below("perception.encoder.", infos) | infos_below("perception.log_mel.", infos),
        )

    def component_configs(self) -> dict[str, Mapping[str, Any]]:
        """Configs of the components, by their folder in a saved model."""
        return {LLM_BACKBONE: self.llm_config}

    def component_files(self) -> dict[str, bytes]:
        """Further files of a saved model, in the folders of the components."""
        return {}

    @property
    def generation_config(self) -> Mapping[str, Any] | None:
        """The LLM's generation_config.json, if there is one beside its config.json."""
        return llm_generation_config(self.llm_directory)

    def with_network(self: B, **changes: Any) -> B:
        """The same model with another `compute_dtype` or `remat`."""
        return replace(self, network=replace(self.network, **changes))


def parameter_names(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> list[NamedSlice]:
    """NeMo's name for every slice of every variable, for freeze patterns."""
    return mapping.names(blueprint.table, unquantized(infos))


def state_dict(blueprint: Blueprint, variables: Variables) -> dict[str, np.ndarray]:
    """Variables under NeMo's parameter names, without aliases; quantized ones in fp32."""
    host = {path: np.asarray(value) for path, value in dequantized(variables).items()}
    return mapping.export(host, blueprint.table)


def load_or_initialize(
    blueprint: Blueprint,
    infos: Mapping[str, VariableInfo],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Variables:
    """Loads the pretrained weights and initializes the rest at random.

    Weights of `init_from_checkpoint` override both. With `layout` each variable is streamed to the
    sharding of its leaf; without, variables stay on the host. Weights that `infos` has quantized
    are quantized one by one, and then they are on a device.
    """
    place, plain = QuantizingPlace(infos, layout), unquantized(infos)
    name = blueprint.config.init_from_checkpoint
    if name is None:
        variables = _load_components(blueprint, plain, place, {})
        return place.scales | variables
    path = initial_weights.find(name, blueprint.near)
    first = initial_weights.match(path, blueprint.table, plain)
    first.log()
    given = first.load(plain, place) | place.scales
    variables = _load_components(blueprint, plain, place, given)
    return place.scales | variables | first.overlay(variables, given)


def _load_components(
    blueprint: Blueprint,
    infos: Mapping[str, VariableInfo],
    place: QuantizingPlace,
    given: Variables,
) -> Variables:
    """Variables that are `given`, then the pretrained components', then random ones."""
    loaded = dict(given)
    for source, table, wanted in blueprint.pretrained(infos):
        if wanted.keys() - given.keys():
            loaded = mapping.load(source, table, wanted, place) | loaded
    missing = frozenset(infos) - frozenset(loaded)
    return loaded | place.all(random_variables(blueprint, missing, place.floating_layout))


def check_weights(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> None:
    """Compares names and shapes of the pretrained weights with the model's; reads no value.

    Raises ConversionError or SettingsError for weights that are missing or do not fit.
    """
    infos = unquantized(infos)
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


def normalized(
    kind: type[object],
    settings: Mapping[str, object],
    component_configs: Mapping[str, Mapping[str, object]],
) -> dict[str, Any]:
    """A `model:` block with all defaults, without ignored keys.

    The architecture of the LLM (its config.json among `component_configs`) is under `llm`. Raises
    ValueError for a block of another kind of model.
    """
    block: dict[str, Any] = to_plain(build(kind, settings, "model"))
    for key, config in (("perception", PerceptionConfig), ("lora", lora_class(settings))):
        if settings.get(key) is not None:
            block[key] = to_plain(build(config, settings[key], f"model.{key}"))
    if LLM_BACKBONE in component_configs:
        block["llm"] = to_plain(hf_config.decoder_config(component_configs[LLM_BACKBONE]))
    return block
