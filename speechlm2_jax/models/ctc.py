"""CTCModel, the user-facing CTC ASR model: NeMo's EncDecCTCModelBPE, also for training."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import DTypeLike

from speechlm2_jax import checkpointing
from speechlm2_jax.asr import ctc_losses
from speechlm2_jax.asr.ctc import CtcConfig, CtcNetwork, collapse
from speechlm2_jax.batches import HostBatch, LossSum, SalmBatch, StepLosses
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.casting import cast
from speechlm2_jax.conversion.ctc import ctc_table
from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference.probe import Outputs, probe_ctc
from speechlm2_jax.inference.sessions.transcription_session import TranscriptionSession
from speechlm2_jax.inference.timestamps.ctc_aligner import CtcAligner
from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.module import VariableInfo, Variables, abstract, describe, merge, split
from speechlm2_jax.layers.stack import Remat
from speechlm2_jax.models import ctc_start
from speechlm2_jax.models.transcriber import Transcriber, best_paths
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.log_mel import LogMelConfig
from speechlm2_jax.perception.spec_augment import SpecAugmentConfig
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.asr_labels import LabelDecoder
from speechlm2_jax.pretrained.label_encoder import LabelEncoder
from speechlm2_jax.pretrained.locate import Location, nemo_tokenizer, read_config_json
from speechlm2_jax.pretrained.salm_config import DEFAULT_AUDIO_LOCATOR_TAG
from speechlm2_jax.pretrained.save_load import run_definition
from speechlm2_jax.settings import SettingsError, build, to_plain
from speechlm2_jax.sharding import context_size

TARGET = "nemo.collections.asr.models.EncDecCTCModelBPE"
TOKENIZER_FILE = "tokenizer.model"
BLOCKS = ("preprocessor", "encoder", "decoder", "spec_augment", "tokenizer")
"""Keys of a `.nemo` file's config that are read here."""


@dataclass(frozen=True, kw_only=True)
class CtcModelConfig:
    """NeMo's `model:` block of a CTC model over a FastConformer."""

    preprocessor: LogMelConfig
    encoder: FastConformerConfig
    tokenizer: Mapping[str, object]
    """`dir`: a folder with tokenizer.model (SentencePiece)."""
    decoder: Mapping[str, object] | None = None
    """NeMo's ConvASRDecoder block; its sizes follow the encoder and the tokenizer."""
    spec_augment: SpecAugmentConfig | None = None
    optimizer: Mapping[str, object] | None = None
    lr_scheduler: Mapping[str, object] | None = None
    seed: int = 0
    init_from_checkpoint: str | None = None
    """A `.nemo` file or a run of a CTC model of the same sizes, whose weights training starts from.
    With another tokenizer the head starts at random."""

    TARGETS: ClassVar[tuple[str, ...]] = ("EncDecCTCModelBPE",)


class CTCModel(Transcriber):
    """FastConformer with a CTC head; transcribes audio, and is trained by `Trainer`.

    `cfg` is NeMo's `model:` block as a plain dict. Raises SettingsError for a bad key or a missing
    tokenizer.
    """

    CONFIG: ClassVar[type[CtcModelConfig]] = CtcModelConfig

    def __init__(
        self,
        cfg: Mapping[str, object],
        *,
        tokenizer: Tokenizer | None = None,
        near: tuple[Path, ...] = (),
    ):
        self.cfg = dict(cfg)
        self._config = build(CtcModelConfig, cfg, "model")
        self.tokenizer = _find_tokenizer(self._config, near) if tokenizer is None else tokenizer
        self.pieces = len(self.tokenizer)
        self.tokenizer.add_special_tokens([DEFAULT_AUDIO_LOCATOR_TAG])
        self._to_text = LabelDecoder.from_tokenizer(self.tokenizer, self.pieces)
        self._network = CtcConfig(
            preprocessor=self._config.preprocessor,
            encoder=self._config.encoder,
            spec_augment=self._config.spec_augment,
            vocab_size=self.pieces,
        )
        self._graphdef, self.infos = self._build()
        self._variables: Variables | None = None
        self.validation_metrics: Mapping[str, Callable[[HostBatch], LossSum]] = {}
        self.nemo_exact = False

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "CTCModel":
        """Loads a `.nemo` file (also the CTC head of a hybrid model) or a run directory.

        Raises SettingsError if there is none, ConversionError for one without a CTC head.
        """
        found = Location().find(str(path), key="pretrained_asr")
        if found.is_dir() and (found / checkpointing.CHECKPOINTS).is_dir():
            registry.require(cls, found)
            return cls._from_run(found)
        archive = read_nemo(registry.find_nemo(cls, path, key="pretrained_asr"))
        cfg = {key: archive.config[key] for key in BLOCKS if archive.config.get(key) is not None}
        model = cls(cfg, tokenizer=nemo_tokenizer(archive))
        model.variables = mapping.load(archive.weights, model._table, model.infos)
        return model

    @classmethod
    def _from_run(cls, run: Path) -> "CTCModel":
        folder = run_definition(run)
        cfg = read_config_json(folder / "config.json", key="pretrained_asr")
        model = cls({**cfg, "tokenizer": {"dir": str(folder)}})
        model.variables = dict(checkpointing.load_weights(run).variables)
        return model

    def save_to(
        self,
        path: str | Path,
        *,
        dtype: DTypeLike | None = np.float32,
        compressed: bool = False,
    ) -> None:
        """Writes a `.nemo` file that NeMo's ASRModel.restore_from reads, with weights in `dtype`.

        None keeps the dtype of each weight; `compressed` writes a gzip-compressed tar. Raises
        ConversionError for values out of range.
        """
        host = {name: np.asarray(value) for name, value in self.variables.items()}
        name = None if dtype is None else np.dtype(dtype).name
        state = cast(mapping.export(host, self._table), name)
        vocabulary = [self.tokenizer.ids_to_tokens([i])[0] for i in range(self.pieces)]
        artifacts = {
            TOKENIZER_FILE: self.tokenizer.serialized(),
            "vocab.txt": "".join(f"{piece}\n" for piece in vocabulary).encode(),
        }
        config = self._nemo_config(vocabulary)
        write_nemo(Path(path), config, state, artifacts, compressed=compressed)

    def probe(self) -> Outputs:
        """Outputs of one small forward pass: another copy of the model gives the same."""
        return probe_ctc(self._graphdef, self.variables, self.sampling_rate)

    def aligner(self) -> CtcAligner:
        """The model as what finds the times of words; see `inference.timestamps.word_times`."""
        return CtcAligner(
            graphdef=self._graphdef,
            variables=self.variables,
            encoder=LabelEncoder.from_tokenizer(self.tokenizer, self.pieces),
            sampling_rate=self.sampling_rate,
            frame_samples=self.frame_samples,
        )

    def session(
        self, *, sampling_rate: int | None = None, context: tuple[int, int] | None = None
    ) -> TranscriptionSession:
        """Starts a live transcription: `for update in session.push(samples)`.

        `sampling_rate` is that of the samples, by default the model's; `context` the encoder's
        (left, right) attention context, by default the first of its `att_context_size`. Raises
        ValueError, naming the setting, for an encoder that needs whole recordings.
        """
        return TranscriptionSession(
            *(self._graphdef, self.variables, self._network.perception),
            *(self._to_text, self.pieces, sampling_rate or self.sampling_rate, context),
        )

    def _decode(self, audio: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        inputs = jnp.asarray(audio), jnp.asarray(lengths)
        paths = np.asarray(best_paths(self._graphdef, self.variables, *inputs))
        return [collapse(path, self.pieces) for path in paths]

    @property
    def architecture(self) -> CtcConfig:
        """Shapes of the network."""
        return self._network

    @property
    def frame_samples(self) -> int:
        """Samples behind one frame of the encoder."""
        return self._network.perception.frame_samples

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the input audio in Hz."""
        return self._network.preprocessor.sample_rate

    # Interface of the trainer ---------------------------------------------------------------

    @property
    def variables(self) -> Variables:
        """Weights and buffers by path; initialized at the first access."""
        if self._variables is None:
            self._variables = self._initial(None)
        return self._variables

    @variables.setter
    def variables(self, values: Variables) -> None:
        """Replaces the weights and buffers: every path of `infos`."""
        self._variables = values

    @property
    def has_variables(self) -> bool:
        """Whether `variables` were set or initialized already."""
        return self._variables is not None

    def load_onto(self, layout: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Returns the initial weights and buffers, each on the sharding of its leaf.

        Raises SettingsError for an `init_from_checkpoint` that does not fit.
        """
        return self._initial(layout)

    def check_weights(self) -> None:
        """Raises SettingsError for an `init_from_checkpoint` that does not fit."""
        if (name := self._config.init_from_checkpoint) is not None:
            ctc_start.read(name, self)

    @property
    def heads(self) -> Mapping[str, int]:
        """Attention heads of each kind."""
        return self.architecture.perception.heads

    @property
    def trainable(self) -> Mapping[str, bool | np.ndarray]:
        """Everything but the buffers."""
        return {path: not info.is_buffer for path, info in self.infos.items()}

    @property
    def frame_count(self) -> Callable[[int], int]:
        """Number of samples of a clip -> number of encoder frames."""
        return self._network.perception.frame_count

    @property
    def optimizer(self) -> Mapping[str, Any] | None:
        """The `model.optimizer` block."""
        return self._config.optimizer

    @property
    def lr_scheduler(self) -> Mapping[str, Any] | None:
        """The `model.lr_scheduler` block."""
        return self._config.lr_scheduler

    @property
    def settings(self) -> dict[str, Any]:
        """The model's configuration as checkpoints store it."""
        return self.cfg

    def normalized_settings(
        self, settings: Mapping[str, object], definitions: Mapping[str, Mapping[str, object]] | None
    ) -> dict[str, Any]:
        """A `model:` block of this class with all defaults; see `training.protocol`."""
        return to_plain(build(CtcModelConfig, settings, "model"))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the log: about `init_from_checkpoint`."""
        name = self._config.init_from_checkpoint
        return () if name is None else (f"the weights start from {name} ({ctc_start.KEY})",)

    @property
    def compute_dtype(self) -> Any:
        """Dtype of activations; the trainer sets it from `trainer.precision`."""
        return jnp.dtype(self._network.compute_dtype)

    @compute_dtype.setter
    def compute_dtype(self, dtype: DTypeLike) -> None:
        """Sets the dtype of the computation."""
        self._network = replace(self._network, compute_dtype=jnp.dtype(dtype).name)
        self._graphdef, self.infos = self._build()

    def use_remat(self, policies: Mapping[str, str]) -> None:
        """Sets the rematerialization (activation checkpointing) policy of perception.

        Raises SettingsError for another component or policy.
        """
        remat = build(Remat, policies, "trainer.remat").perception
        self._network = replace(self._network, remat=remat)
        self._graphdef, self.infos = self._build()

    def losses(
        self,
        variables: Variables,
        batch: SalmBatch[jax.Array],
        *,
        key: jax.Array | None,
        train: bool,
    ) -> StepLosses:
        """Sums of the CTC loss; pure and traceable."""
        if context_size() > 1:
            raise SettingsError(
                "trainer.strategy: context parallelism shards the tokens of an LLM, and a CTC "
                "model has no LLM; set context_parallel_size to 1"
            )
        network: CtcNetwork = merge(self._graphdef, variables)
        return ctc_losses.losses(network, batch, train=train, key=key if train else None)

    def flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one training step: 6 per weight and frame, plus attention."""
        count = np.vectorize(lambda n: self.frame_count(int(n)), otypes=[np.int64])
        frames = count(batch.arrays.audio_lengths).astype(float)
        weights = sum(
            int(np.prod(info.shape))
            for path, info in self.infos.items()
            if path.startswith(("encoder.layers.", "head.")) and not info.is_buffer
        )
        encoder = self._network.encoder
        attention = 2.0 * encoder.n_layers * encoder.d_model * float((frames**2).sum())
        return 6.0 * (weights * float(frames.sum()) + attention)

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts a batch's (frames without padding, frames with padding)."""
        lengths = batch.arrays.audio_lengths
        hop = self.frame_samples
        return int(lengths.sum()) // hop, int(batch.arrays.audio.size) // hop

    def save_definition(self, directory: Path) -> None:
        """Writes config.json and the tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        cfg = {key: value for key, value in self.cfg.items() if key != "init_from_checkpoint"}
        (directory / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
        (directory / TOKENIZER_FILE).write_bytes(self.tokenizer.serialized())

    # ------------------------------------------------------------------------------------------

    @property
    def _table(self) -> mapping.Table:
        return ctc_table(self._network.perception)

    def _initial(self, layout: Mapping[str, jax.ShapeDtypeStruct] | None) -> Variables:
        drawn = draw(lambda: split(self._make(nnx.Rngs(self._config.seed)))[1], layout)
        if (name := self._config.init_from_checkpoint) is None:
            return drawn
        start = ctc_start.read(name, self)
        return {path: ctc_start.placed(start.get(path), value) for path, value in drawn.items()}

    def _make(self, rngs: nnx.Rngs) -> CtcNetwork:
        return CtcNetwork(self._network, rngs=rngs)

    def _build(self) -> tuple[nnx.GraphDef[CtcNetwork], dict[str, VariableInfo]]:
        module = abstract(self._make)
        return split(module)[0], describe(module)

    def _nemo_config(self, vocabulary: list[str]) -> dict[str, Any]:
        encoder = self._network.encoder
        return {
            "target": f"{TARGET.rsplit('.', 1)[0]}.ctc_bpe_models.EncDecCTCModelBPE",
            "sample_rate": self.sampling_rate,
            **{key: self.cfg[key] for key in ("preprocessor", "encoder") if key in self.cfg},
            **({"spec_augment": self.cfg["spec_augment"]} if "spec_augment" in self.cfg else {}),
            "decoder": {
                "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
                "feat_in": encoder.width,
                "num_classes": self.pieces,
                "vocabulary": vocabulary,
            },
            "tokenizer": {
                "dir": None,
                "type": "bpe",
                "model_path": f"nemo:{TOKENIZER_FILE}",
                "vocab_path": "nemo:vocab.txt",
                "spe_tokenizer_vocab": "nemo:vocab.txt",
            },
            "decoding": {"strategy": "greedy_batch"},
        }


def _find_tokenizer(config: CtcModelConfig, near: tuple[Path, ...]) -> Tokenizer:
    folder = config.tokenizer.get("dir")
    if not isinstance(folder, str):
        raise SettingsError(
            f"model.tokenizer.dir: expected the folder that holds tokenizer.model, got {folder!r}"
        )
    found = Location(near=near).find(folder, key="model.tokenizer.dir")
    return Tokenizer(found / TOKENIZER_FILE)
