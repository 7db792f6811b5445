"""`SpeechModel`, the base of the models with an LLM: construction, loading, saving, training."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from speechlm2_jax import parameter_paths, settings, sharding
from speechlm2_jax.batches import HostBatch, LossSum, StepLosses
from speechlm2_jax.conversion.quantizing import QuantizingPlace
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference import meshes, stages
from speechlm2_jax.layers.module import VariableInfo, Variables, abstract, describe, split
from speechlm2_jax.layers.quantized_layers import quantized_paths, scale_path
from speechlm2_jax.layers.stack import Remat
from speechlm2_jax.layers.unstacked import Layered, LayerViews
from speechlm2_jax.models.exportable import Exportable
from speechlm2_jax.models.perceiving import Perceiving
from speechlm2_jax.pretrained import blueprint as blueprints
from speechlm2_jax.pretrained import initial_weights, registry, save_load
from speechlm2_jax.pretrained.components import ModelConfig, lora_notes
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.pretrained.quantization import Quantization
from speechlm2_jax.settings import SettingsError

M = TypeVar("M", bound="SpeechModel")
COMPUTE_DTYPES = ("float32", "bfloat16")


class SpeechModel(Perceiving, Exportable):
    """A pretrained LLM with a pretrained speech encoder in front of it.

    `cfg` is NeMo's `model:` block as a plain dict. Weights come from the components that it names
    unless `pretrained_weights` is false. Raises SettingsError, before anything is compiled, for a
    bad key, a missing file, a missing token or widths that do not fit.
    """

    CONFIG: ClassVar[type[ModelConfig]]
    """The dataclass that reads the `model:` block."""
    ALWAYS_FROZEN: ClassVar[tuple[str, ...]] = ()
    """Patterns of parameter names that no setting can unfreeze."""

    def __init__(
        self,
        cfg: Mapping[str, object],
        *,
        variables: Variables | None = None,
        near: tuple[Path, ...] = (),
    ):
        self._blueprint = self.read_blueprint(cfg, near)
        frozen = self._blueprint.config.quantize_frozen_llm
        self._quantization = Quantization(weights=frozen)
        self._graphdef, self.infos = self._build()
        self.parameter_names = blueprints.parameter_names(self._blueprint, self.infos)
        self._selection = self._select()
        self._check_frozen()
        self._variables = variables
        self._layer_views = LayerViews("llm.")
        self.validation_metrics: Mapping[str, Callable[[HostBatch], LossSum]] = {}

    @classmethod
    @abstractmethod
    def read_blueprint(cls, cfg: Mapping[str, object], near: tuple[Path, ...]) -> Any:
        """Reads configs and tokenizer, no weights."""

    @abstractmethod
    def losses(
        self, variables: Variables, batch: PyTree, *, key: jax.Array | None, train: bool
    ) -> StepLosses:
        """Computes the loss sums of one batch; pure and traceable."""

    @abstractmethod
    def flops(self, batch: HostBatch) -> float:
        """Counts the model FLOPs of one training step on `batch`."""

    @abstractmethod
    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts a batch's (tokens without padding, tokens with padding)."""

    @property
    def variables(self) -> Variables:
        """Weights and buffers by path: loaded or randomly initialized at the first access."""
        if self._variables is None:
            loaded = blueprints.load_or_initialize(self._blueprint, self.infos)
            self._variables = stages.on_default_device(loaded)
        return self._variables

    @variables.setter
    def variables(self, values: Variables) -> None:
        """Replaces the weights and buffers: every path of `infos`."""
        self._variables = values
        self._layer_views = LayerViews("llm.")  # views would keep the memory of the old ones

    @property
    def has_variables(self) -> bool:
        """Whether `variables` were set, loaded or initialized already."""
        return self._variables is not None

    def load_onto(self, layout: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Returns the initial weights and buffers, loaded onto the sharding of each leaf."""
        return blueprints.load_or_initialize(self._blueprint, self.infos, layout)

    def check_weights(self) -> None:
        """Raises ConversionError or SettingsError where `load_onto` would; reads no value."""
        blueprints.check_weights(self._blueprint, self.infos)

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: str = "float32",
        strategy: object = None,
        devices: Sequence[jax.Device] | None = None,
        quantize: str | None = None,
        kv_cache_dtype: str | None = None,
    ) -> M:
        """Loads a model from a path or hub name.

        It may be a run directory (best, else last checkpoint), a saved directory, a NeMo or
        Hugging Face directory, a Lightning `.ckpt` (file or folder), or a hub name. `dtype` is the
        dtype of the computation.

        With `strategy` the weights lie on `devices` (all by default), each device reads only its
        part, and inference runs on all of them: "auto" (`meshes.inference_sharding`), or what
        `trainer.strategy` takes. Without it they lie on the default device.

        `quantize` and `kv_cache_dtype` are the arguments of `quantize`. Weights are quantized as
        they are read: a device never holds the whole model in full precision.

        Raises SettingsError that names what is missing, or the class that opens it, and for weights
        that the devices cannot hold.
        """
        path = Location().find(str(pretrained_model_name_or_path), key="pretrained_name")
        registry.require(cls, path)
        source = save_load.open_model(str(path))
        model = cls(source.cfg, near=source.near)
        model._blueprint = replace(model._blueprint, named=source.named, origin=path)

        stored = model.infos

        def rebuild(cfg: Mapping[str, object], near: tuple[Path, ...]) -> Variables:
            return blueprints.load_or_initialize(cls.read_blueprint(cfg, near), stored)

        model = model.astype(dtype).quantize(quantize, kv_cache_dtype, devices=devices)
        if strategy is None:
            variables = source.read(model._blueprint, model.infos, rebuild, None)
            model.variables = stages.on_default_device(variables)
            return model
        given = devices or jax.devices()
        mesh = meshes.inference_sharding(strategy, given, model.infos, model.compute_dtype)
        layout = meshes.variable_layout(model.infos, model.compute_dtype, mesh)
        model.variables = source.read(model._blueprint, model.infos, rebuild, layout)
        return model

    # NeMo's attributes ----------------------------------------------------------------------

    @property
    def cfg(self) -> dict[str, Any]:
        """The `model:` block with the architecture of every component filled in."""
        return dict(self._blueprint.cfg)

    @property
    def tokenizer(self) -> Tokenizer:
        """The text tokenizer."""
        return self._blueprint.tokenizer

    @property
    def text_vocab_size(self) -> int:
        """Number of tokens in the embedding table."""
        return self._blueprint.network.llm.vocab_size

    @property
    def text_bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if the tokenizer has one."""
        return self.tokenizer.bos_id

    @property
    def text_eos_id(self) -> int | None:
        """Id of the end-of-sequence token, if the tokenizer has one."""
        return self.tokenizer.eos_id

    @property
    def text_pad_id(self) -> int:
        """Id used as padding: the pad token, else unk, else 0."""
        return self._blueprint.pad_id

    @property
    def device(self) -> jax.Device:
        """The device that the model runs on, the first of several. Inputs may be on any."""
        return stages.device_of(self._variables)

    @property
    def mesh(self) -> Mesh | None:
        """The devices of the weights; None for one device, and if no weights are loaded."""
        return sharding.mesh_of(self._variables or {})

    def eval(self: M) -> M:
        """Returns the model itself: training is an argument here, not a mode."""
        return self

    def astype(self: M, dtype: str) -> M:
        """Sets the dtype of the computation: "float32" or "bfloat16"."""
        if dtype not in COMPUTE_DTYPES:
            raise SettingsError(f"dtype {dtype!r} is not supported; use float32 or bfloat16")
        if dtype == self._blueprint.network.compute_dtype:
            return self
        self._blueprint = self._blueprint.with_network(compute_dtype=dtype)
        self._graphdef, self.infos = self._build()
        return self

    def quantize(
        self: M,
        weights: str | None = None,
        kv_cache: str | None = None,
        *,
        devices: Sequence[jax.Device] | None = None,
    ) -> M:
        """Sets how inference holds the LLM in 8 bits: "int8", "fp8", or None for no change.

        `weights` are the linear layers, the embedding table and the output layer, with a scale for
        each output channel; LoRA, biases and norms stay as they are, and so does the encoder.
        `kv_cache` has a scale for each token and head. Weights that are loaded are quantized in
        place. Raises SettingsError for another name, for weights that are quantized differently
        already, and for fp8 on `devices` (the default device) that do not compute in it.
        """
        changed = self._quantization.changed(weights, kv_cache)
        if changed == self._quantization:
            return self
        changed.check_device(devices[0] if devices else self.device)
        self._quantization = changed
        self._graphdef, self.infos = self._build()
        if self._variables is not None:
            place = QuantizingPlace(self.infos)
            self.variables = place.all(self._variables) | place.scales
        return self

    # Interface of the trainer ---------------------------------------------------------------

    @property
    def heads(self) -> Mapping[str, int]:
        """Attention heads of each kind."""
        network = self._blueprint.network
        return {
            "query heads of the LLM": network.llm.heads,
            "key and value heads of the LLM": network.llm.kv_heads,
            **network.perception.heads,
        }

    @property
    def trainable(self) -> Mapping[str, bool | np.ndarray]:
        """Variable path -> whether it is trained; a bool array per layer for a stack.

        Raises SettingsError if quantized weights would be trained.
        """
        self._check_frozen()
        scales = map(scale_path, quantized_paths(self.infos))
        return {**self._selection.trainable, **dict.fromkeys(scales, False)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the log: about the freeze patterns, and about `init_from_checkpoint`."""
        name = self._blueprint.config.init_from_checkpoint
        start = () if name is None else (f"the weights start from {name} ({initial_weights.KEY})",)
        lora = lora_notes(self._blueprint.config, self._blueprint.network.llm)
        return (*self._selection.notes, *start, *lora)

    @property
    def settings(self) -> dict[str, Any]:
        """The model's configuration as checkpoints store it."""
        return self.cfg

    def normalized_settings(
        self, settings: Mapping[str, object], definitions: Mapping[str, Mapping[str, object]] | None
    ) -> dict[str, Any]:
        """A `model:` block of this class with all defaults; see `training.protocol`."""
        own = self._blueprint.component_configs() if definitions is None else definitions
        return blueprints.normalized(self.CONFIG, settings, own)

    @property
    def optimizer(self) -> Mapping[str, Any] | None:
        """The `model.optimizer` block."""
        return self._blueprint.config.optimizer

    @property
    def lr_scheduler(self) -> Mapping[str, Any] | None:
        """The `model.lr_scheduler` block."""
        return self._blueprint.config.lr_scheduler

    @property
    def nemo_exact(self) -> bool:
        """Whether results that depend on NeMo's own padding are reproduced."""
        return self._blueprint.config.nemo_exact

    @property
    def compute_dtype(self) -> np.dtype:
        """Dtype of activations; the trainer sets it from `trainer.precision`."""
        return jnp.dtype(self._blueprint.network.compute_dtype)

    @compute_dtype.setter
    def compute_dtype(self, dtype: DTypeLike) -> None:
        """Sets the dtype of the computation, as `astype`."""
        self.astype(jnp.dtype(dtype).name)

    def use_remat(self, policies: Mapping[str, str]) -> None:
        """Sets the rematerialization (activation checkpointing) policy of llm and perception.

        Raises SettingsError for another component or policy.
        """
        remat = settings.build(Remat, policies, "trainer.remat")
        self._blueprint = self._blueprint.with_network(remat=remat)
        self._graphdef, self.infos = self._build()

    def _inference_variables(self) -> Variables:
        """`variables` as inference programs read them."""
        return cast(Variables, self._layer_views.whole(self._graphdef, self.variables))

    def _decoding_variables(self) -> Layered:
        """`variables` for a program whose loop runs the LLM token by token."""
        return self._layer_views(self._graphdef, self.variables)

    def is_trained(self, prefix: str) -> bool:
        """Whether training changes any parameter below a path."""
        return any(
            np.any(self.trainable[path])
            for path, info in self.infos.items()
            if path.startswith(prefix) and not info.is_buffer
        )

    def _build(self) -> tuple[Any, dict[str, VariableInfo]]:
        blueprint, chosen = self._blueprint, self._quantization
        module = abstract(lambda rngs: chosen.applied(blueprint.make(rngs)))
        return split(module)[0], describe(module)

    def _check_frozen(self) -> None:
        """Raises SettingsError if training would change weights that are quantized."""
        trainable = self._selection.trainable
        for path in quantized_paths(self.infos):
            if np.any(trainable[path]):
                name = next(s.name for s in self.parameter_names if s.path == path)
                raise SettingsError(
                    f"model.quantize_frozen_llm: {self._quantization.weights} weights cannot be "
                    f"trained, but freeze_params leaves {name} to training; set model.lora, or add "
                    r"^(llm|embed_tokens)\..+$ to model.freeze_params"
                )

    def _freeze_patterns(self) -> tuple[list[str], list[str]]:
        """`freeze_params` and `prevent_freeze_params`."""
        config = self._blueprint.config
        return list(config.freeze_params), list(config.prevent_freeze_params)

    def _select(self) -> parameter_paths.Selection:
        config = self._blueprint.config
        freeze, prevent = self._freeze_patterns()
        if config.lora is not None:
            # PEFT freezes the whole base LLM, its embedding included, and trains the adapters
            freeze.append(r"^(llm|embed_tokens)\..+$")
            prevent += [r"^.+\.lora_.+$"]
        return parameter_paths.select(
            self.parameter_names, freeze, prevent, always=self.ALWAYS_FROZEN
        )
