"""Everything about a model but its weights, and how the weights start."""

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
Pretrained = tuple[mapping.TensorSource, mapping.Table, dict[str, VariableInfo]]
"""Where weights are, how they are named, and what they fill."""


class ModelConfig(Protocol):
    """The keys of every `model:` block that builds on a pretrained LLM."""

    @property
    def pretrained_weights(self) -> bool:
        """Whether the named parts give weights, too."""
        ...

    @property
    def freeze_params(self) -> tuple[str, ...]:
        """Patterns of names that training leaves alone."""
        ...

    @property
    def prevent_freeze_params(self) -> tuple[str, ...]:
        """Patterns that win over those."""
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
        """Whether NeMo's padding is reproduced."""
        ...

    @property
    def init_from_checkpoint(self) -> str | None:
        """A model of the user's own whose weights come before all others."""
        ...

    @property
    def seed(self) -> int:
        """Of the random start."""
        ...


class NetworkConfig(Protocol):
    """What every architecture here has."""

    @property
    def llm(self) -> DecoderConfig:
        """The LLM."""
        ...

    @property
    def perception(self) -> PerceptionConfig:
        """What hears."""
        ...

    @property
    def lora(self) -> LoraConfig | None:
        """The LLM's adapters."""
        ...

    @property
    def compute_dtype(self) -> str:
        """Dtype of activations."""
        ...

    @property
    def remat(self) -> Remat:
        """What the backward pass computes again."""
        ...


@dataclass(frozen=True, kw_only=True)
class Blueprint(ABC):
    """Everything about a model but its weights."""

    config: Any
    """The `model:` block as read (`ModelConfig`)."""
    cfg: Mapping[str, Any]
    """The `model:` block with the architecture of every part filled in."""
    llm_config: Mapping[str, Any]
    """The LLM's config.json, as it was read."""
    tokenizer: Tokenizer
    pad_id: int
    network: Any
    """The architecture (`NetworkConfig`)."""
    llm_directory: Path
    asr_file: Path | None
    near: tuple[Path, ...] = ()
    """Where names are looked up beside the working directory."""
    named: Mapping[str, Any] | None = None
    """`cfg` as the directory says it that the model was loaded from, None if from none."""

    @property
    @abstractmethod
    def table(self) -> mapping.Table:
        """NeMo's names of the whole model."""

    @abstractmethod
    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """Makes the network."""

    @abstractmethod
    def pretrained(self, infos: Mapping[str, VariableInfo]) -> Iterator[Pretrained]:
        """Where the pretrained weights are."""

    def definitions(self) -> dict[str, Mapping[str, Any]]:
        """Configs of the parts, by the folder of a saved model that keeps each."""
        return {LLM_BACKBONE: self.llm_config}

    def computing(self: B, **changes: Any) -> B:
        """The same model with another `compute_dtype` or `remat`."""
        return replace(self, network=replace(self.network, **changes))


def parameter_names(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> list[NamedSlice]:
    """NeMo's name for every slice of every variable, for freeze patterns."""
    return mapping.names(blueprint.table, infos)


def state_dict(blueprint: Blueprint, variables: Variables) -> dict[str, np.ndarray]:
    """Values by variable path -> the same under NeMo's names, aliases left out."""
    host = {path: np.asarray(value) for path, value in variables.items()}
    return mapping.export(host, blueprint.table)


def start(
    blueprint: Blueprint,
    infos: Mapping[str, VariableInfo],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> Variables:
    """Loads what has pretrained weights and starts the rest at random.

    What `init_from_checkpoint` has comes before both. With `layout` each variable is streamed to
    where its leaf says; else they stay on the host.
    """
    place = None if layout is None else onto(layout)
    name = blueprint.config.init_from_checkpoint
    if name is None:
        return _start(blueprint, infos, layout, {})
    path = initial_weights.find(name, blueprint.near)
    first = initial_weights.match(path, blueprint.table, infos)
    first.log()
    given = first.load(infos, place)
    variables = _start(blueprint, infos, layout, given)
    return variables | first.overlay(variables, given)


def _start(
    blueprint: Blueprint,
    infos: Mapping[str, VariableInfo],
    layout: Mapping[str, jax.ShapeDtypeStruct] | None,
    given: Variables,
) -> Variables:
    """What is `given`, then what the pretrained components have, then random values."""
    place = None if layout is None else onto(layout)
    loaded = dict(given)
    for source, table, wanted in blueprint.pretrained(infos):
        if wanted.keys() - given.keys():
            loaded = mapping.load(source, table, wanted, place) | loaded
    missing = frozenset(infos) - frozenset(loaded)
    return loaded | random_variables(blueprint, missing, layout)


def check_weights(blueprint: Blueprint, infos: Mapping[str, VariableInfo]) -> None:
    """Compares names and shapes of the pretrained weights with the model's, reading no value.

    Raises ConversionError or SettingsError for what is missing or does not fit.
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
    """Draws the named variables from their initial distributions, and only those."""

    def make() -> Variables:
        variables = split(blueprint.make(nnx.Rngs(blueprint.config.seed)))[1]
        return {path: value for path, value in variables.items() if path in paths}

    return draw(make, layout)


def under(
    prefix: str, infos: Mapping[str, VariableInfo], but: tuple[str, ...] = ()
) -> dict[str, VariableInfo]:
    """The variables below a prefix, but those that end in one of `but`."""
    return {
        path: info
        for path, info in infos.items()
        if path.startswith(prefix) and not path.endswith(but or ("\0",))
    }


def perception_config(
    block: Mapping[str, Any], asr_file: Path | None, llm_width: int
) -> tuple[dict[str, Any], PerceptionConfig]:
    """The perception block, completed; where the user's says nothing, the ASR model's own hold."""
    merged = dict(block)
    asr = {} if asr_file is None else read_nemo(asr_file).config
    for name in ASR_BLOCKS:
        own = {k: v for k, v in (merged.get(name) or {}).items() if v is not None}
        if name in asr:
            # NeMo: the user's encoder keys override; the preprocessor is the ASR model's
            merged[name] = {**asr[name], **(own if name == "encoder" else {})}
        elif not own:
            raise SettingsError(
                f"model.perception.{name}: required, because no pretrained_asr gives it; set "
                "model.pretrained_asr to a .nemo file or write the block"
            )
    # NeMo: whatever the YAML says, the last layer of perception is as wide as the LLM
    merged["output_dim"] = llm_width
    adapter = merged.get("modality_adapter")
    if isinstance(adapter, Mapping) and adapter.get("output_dim") is not None:
        merged["modality_adapter"] = {**adapter, "output_dim": llm_width}
    return merged, build(PerceptionConfig, merged, "model.perception")


def normalized(
    kind: type[Any],
    settings: Mapping[str, Any],
    definitions: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A `model:` block with all defaults, without keys that mean nothing here.

    The architecture of the LLM, by its config.json among `definitions`, is under `llm`. Raises
    ValueError for a block of another kind of model.
    """
    block: dict[str, Any] = to_plain(build(kind, settings, "model"))
    for key, part in (("perception", PerceptionConfig), ("lora", LoraConfig)):
        if settings.get(key) is not None:
            block[key] = to_plain(build(part, settings[key], f"model.{key}"))
    if LLM_BACKBONE in definitions:
        block["llm"] = to_plain(hf_config.decoder_config(definitions[LLM_BACKBONE]))
    return block


def needs_asr(pretrained_weights: bool, perception: Mapping[str, Any]) -> bool:
    """Whether the ASR model must be found: for its weights, or for what it says of itself."""
    return pretrained_weights or any(b not in perception for b in ASR_BLOCKS)
