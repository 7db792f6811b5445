"""SALM as a user holds it: network, tokenizer, settings and weights in one object."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from speechlm2_jax import parameter_paths, settings
from speechlm2_jax.batches import BatchShape, HostBatch, LossSum, SalmBatch, SalmExample, StepLosses
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.layers.module import (
    Remat,
    VariableInfo,
    Variables,
    abstract,
    bind,
    describe,
    unbind,
)
from speechlm2_jax.models import answering, building, loading
from speechlm2_jax.models.building import Blueprint
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.flops import salm_flops
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.perception.perception import PerceptionModes
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding

COMPUTE_DTYPES = ("float32", "bfloat16")


class SALM:
    """A decoder LLM that listens: FastConformer -> modality adapter -> projection -> LLM.

    `cfg` is NeMo's `model:` block as a plain dict. Weights come from `pretrained_llm` and
    `pretrained_asr` unless `pretrained_weights` is false. Raises SettingsError, before anything is
    compiled, for a bad key, a missing file, a missing token or widths that do not fit.
    """

    def __init__(
        self,
        cfg: Mapping[str, Any],
        *,
        variables: Variables | None = None,
        near: tuple[Path, ...] = (),
    ):
        self._blueprint: Blueprint = building.read_blueprint(cfg, near)
        self._definition, self.infos = self._build()
        self.parameter_names = building.parameter_names(self._blueprint, self.infos)
        self._selection = self._select()
        self._variables = variables
        self.validation_metrics: Mapping[str, Callable[[HostBatch], LossSum]] = {}

    @property
    def variables(self) -> Variables:
        """Weights and buffers by path: loaded, or started at random, when first asked for."""
        if self._variables is None:
            self._variables = building.start(self._blueprint, self.infos)
        return self._variables

    @variables.setter
    def variables(self, values: Variables) -> None:
        self._variables = values

    @property
    def has_variables(self) -> bool:
        """Whether they are there already."""
        return self._variables is not None

    def load_onto(self, layout: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Weights and buffers as they start, each streamed to where its leaf says; not kept."""
        return building.start(self._blueprint, self.infos, layout)

    def check_weights(self) -> None:
        """Raises ConversionError or SettingsError if `load_onto` could not; reads no value."""
        building.check_weights(self._blueprint, self.infos)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, dtype: str = "float32"
    ) -> "SALM":
        """Loads a model from wherever it is.

        That may be a run directory (best, else last checkpoint), a saved directory, a NeMo or
        Hugging Face directory, a Lightning `.ckpt`, or a hub name. `dtype` is that of the
        computation. Raises SettingsError with what is missing.
        """
        source = loading.open_model(str(pretrained_model_name_or_path))
        model = cls(source.cfg, near=source.near)
        model.variables = source.read(model._blueprint, model.infos)
        return model.astype(dtype)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes a directory that `from_pretrained` here and in NeMo 3.0.0 reads."""
        loading.save_model(Path(save_directory), self._blueprint, self.variables)

    def save_definition(self, directory: str | Path) -> None:
        """Writes all but the weights: config, LLM architecture and tokenizer."""
        loading.save_definition(Path(directory), self._blueprint)

    def state_dict(self, variables: Variables | None = None) -> dict[str, np.ndarray]:
        """The weights, or other values of the same paths and shapes, under NeMo's names."""
        values = self.variables if variables is None else variables
        return building.state_dict(self._blueprint, values)

    # What NeMo's users know -----------------------------------------------------------------

    @property
    def cfg(self) -> dict[str, Any]:
        """The `model:` block with the architecture of every pretrained part filled in."""
        return dict(self._blueprint.cfg)

    @property
    def tokenizer(self) -> Any:
        """The text tokenizer, with the audio placeholder added."""
        return self._blueprint.tokenizer

    @property
    def audio_locator_tag(self) -> str:
        """The text that stands for one audio clip in a prompt."""
        return self._blueprint.config.audio_locator_tag

    @property
    def audio_locator_tag_id(self) -> int:
        """Token id of the placeholder."""
        return self._blueprint.placeholder_id

    @property
    def text_vocab_size(self) -> int:
        """Rows of the embedding table."""
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
    def sampling_rate(self) -> int:
        """Samples per second that the model hears."""
        return self._blueprint.network.perception.preprocessor.sample_rate

    @property
    def token_equivalent_duration(self) -> float:
        """Seconds of audio behind one frame that the LLM sees."""
        return self._blueprint.network.perception.token_equivalent_duration

    def eval(self) -> "SALM":
        """Returns the model: whether to train is an argument here, not a mode."""
        return self

    def astype(self, dtype: str) -> "SALM":
        """Sets the dtype of the computation: "float32" or "bfloat16"."""
        if dtype not in COMPUTE_DTYPES:
            raise SettingsError(f"dtype {dtype!r} is not supported; use float32 or bfloat16")
        self._blueprint = self._blueprint.computing(compute_dtype=dtype)
        self._definition, self.infos = self._build()
        return self

    def perception(
        self, input_signal: Any, input_signal_length: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes audio [B, S] with lengths [B] in samples into (frames [B, T, D], lengths [B])."""
        return answering.perceive(
            self._definition,
            self.variables,
            jnp.asarray(input_signal, jnp.float32),
            jnp.asarray(input_signal_length, jnp.int32),
        )

    def __call__(self, input_embeds: Any, attention_mask: Any = None) -> dict[str, jax.Array]:
        """Runs the LLM over embeddings [B, T, D] with a bool mask [B, T]: {"logits": [B, T, V]}."""
        embeds = jnp.asarray(input_embeds)
        mask = jnp.ones(embeds.shape[:2], bool) if attention_mask is None else attention_mask
        logits = answering.text_logits(
            self._definition, self.variables, embeds, jnp.asarray(mask, bool)
        )
        return {"logits": logits}

    def generate(
        self,
        prompts: Any,
        audios: Any = None,
        audio_lens: Any = None,
        generation_config: Any = None,
        enable_thinking: bool | None = None,
        **generation_kwargs: Any,
    ) -> np.ndarray:
        """Answers prompts: int32 ids [B, T], rows padded with `text_pad_id` after they stop.

        `prompts`: dialogs (lists of turns with `role`, `content` or `slots`, optionally `audio`: a
        list of paths or arrays), or token ids [B, L] padded on the left. `audios` [B', S] float at
        `sampling_rate` with `audio_lens` [B'] give one clip per placeholder, in order. With audio
        only new tokens come back; text-only prompts come back before them, as NeMo does.
        `generation_config`: a transformers GenerationConfig; keywords (max_new_tokens, do_sample,
        temperature, top_k, top_p, eos_token_id, seed) override it. Raises ValueError for what is
        not supported, `enable_thinking` among it: no prompt format here has a thinking mode.
        """
        if enable_thinking is not None:
            raise ValueError(
                f"prompt format {self.prompt_formatter.name!r} has no thinking mode; leave "
                "enable_thinking out"
            )
        return answering.generate(
            self,
            self._definition,
            (prompts, audios, audio_lens),
            generation_config,
            generation_kwargs,
        )

    def answer(self, prompts: Sequence[SalmExample], max_new_tokens: int) -> np.ndarray:
        """Answers laid-out prompts greedily: int32 ids [B, T], padded after each row's end."""
        decoding = answering.decoding_config(self, None, {"max_new_tokens": max_new_tokens})
        return answering.answer_examples(self, self._definition, prompts, decoding)

    def answer_layout(self, placement: Sharding) -> dict[str, jax.ShapeDtypeStruct]:
        """Dtype and place of every variable of a model that only answers."""
        return answering.layout(self, placement)

    def compile_answer(self, placement: Sharding, shape: BatchShape, max_new_tokens: int) -> Any:
        """Compiles `answer` for devices that need not be here; nothing runs.

        `shape` holds the prompts of one group of `placement`. Gives what
        `jax.jit(...).lower(...).compile()` does.
        """
        return answering.compile_ahead(self, self._definition, placement, shape, max_new_tokens)

    @property
    def prompt_formatter(self) -> PromptFormatter:
        """Writes dialogs in the model's chat format."""
        return self._blueprint.formatter

    # What the trainer needs -----------------------------------------------------------------

    @property
    def frame_count(self) -> Callable[[int], int]:
        """Samples of a clip -> frames that the LLM sees."""
        return self._blueprint.network.perception.frame_count

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
        """Per variable path, whether training changes it; a bool array per layer of a stack."""
        return self._selection.trainable

    @property
    def notes(self) -> tuple[str, ...]:
        """What the freeze patterns leave to say."""
        return tuple(self._selection.notes)

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint keeps of the model's configuration."""
        return self.cfg

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
    def compute_dtype(self) -> Any:
        """Dtype of activations; the trainer sets it from `trainer.precision`."""
        return jnp.dtype(self._blueprint.network.compute_dtype)

    @compute_dtype.setter
    def compute_dtype(self, dtype: Any) -> None:
        self.astype(jnp.dtype(dtype).name)

    def use_remat(self, policies: Mapping[str, str]) -> None:
        """Chooses what the backward pass computes again, by part: llm, perception.

        Raises SettingsError for another part or policy.
        """
        remat = settings.build(Remat, policies, "trainer.remat")
        self._blueprint = self._blueprint.computing(remat=remat)
        self._definition, self.infos = self._build()

    def losses(
        self, variables: Variables, batch: SalmBatch, *, key: jax.Array | None, train: bool
    ) -> StepLosses:
        """Sums of next-token cross-entropy and accuracy; pure and traceable."""
        network: Salm = bind(self._definition, variables)
        modes = self._training_modes() if train else SalmModes()
        return salm_network.losses(network, batch, modes, key if train else None)

    def flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one training step on `batch`."""
        return self._flops(batch, self.trainable)

    def _flops(self, batch: HostBatch, trainable: Mapping[str, bool | np.ndarray]) -> float:
        arrays: SalmBatch = batch.arrays
        count = np.vectorize(lambda n: self.frame_count(int(n)), otypes=[np.int64])
        perception = self._blueprint.network.perception
        return salm_flops(
            self.infos,
            trainable,
            arrays,
            count(arrays.audio_lengths) if arrays.audio_lengths.size else np.zeros(1),
            subsampling_factor=perception.encoder.subsampling_factor,
        )

    def answer_flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one forward pass over `batch`, prompts and answers together."""
        return self._flops(batch, dict.fromkeys(self.infos, False))

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts (steps that hold data, all steps) of a batch's rows."""
        segments = batch.arrays.segments
        return int((segments > 0).sum()), int(segments.size)

    def _build(self) -> tuple[Any, dict[str, VariableInfo]]:
        config = self._blueprint.network
        module = abstract(lambda: Salm(config, rngs=nnx.Rngs(0)))
        return unbind(module)[0], describe(module)

    def _select(self) -> parameter_paths.Selection:
        config = self._blueprint.config
        freeze, prevent = list(config.freeze_params), list(config.prevent_freeze_params)
        if config.lora is not None:
            # PEFT freezes the whole base LLM, its embedding included, and trains the adapters
            freeze.append(r"^(llm|embed_tokens)\..+$")
            prevent += [r"^.+\.lora_.+$"]
        return parameter_paths.select(self.parameter_names, freeze, prevent)

    def _training_modes(self) -> SalmModes:
        def any_trained(prefix: str) -> bool:
            return any(
                np.any(self.trainable[p])
                for p, info in self.infos.items()
                if p.startswith(prefix) and not info.is_buffer
            )

        return SalmModes(
            perception=PerceptionModes(
                encoder=any_trained("perception.encoder."),
                adapter=True,
                spec_augment=True,
                nemo_exact=self.nemo_exact,
            ),
            llm=any_trained("llm."),
        )
