"""The `model:` block of a SALM, with NeMo's keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

TRANSCRIBING = "AudioTranscriptionPerceptionModule"
"""NeMo's class of the perception module of a SALMWithAsrDecoder."""
DEFAULT_AUDIO_LOCATOR_TAG = "<|audioplaceholder|>"


@dataclass(frozen=True, kw_only=True)
class SalmModelConfig:
    """NeMo's `model:` block for SALM; nested blocks that are read elsewhere stay mappings."""

    pretrained_llm: str
    """Hugging Face LLM (directory or hub name) or GGUF file: architecture, tokenizer, weights."""
    pretrained_asr: str | None = None
    """`.nemo` file (or hub name) whose preprocessor and encoder initialize perception."""
    pretrained_weights: bool = True
    """False: components give their architecture only; every weight is initialized at random."""
    tokenizer_path: str | None = None
    """Where the tokenizer is, if not with `pretrained_llm`."""
    freeze_params: tuple[str, ...] = ()
    prevent_freeze_params: tuple[str, ...] = ()
    prompt_format: str | None = None
    """A name of `data.prompts.FORMATS`; `auto`, the default: the tokenizer's own chat template."""
    audio_locator_tag: str = DEFAULT_AUDIO_LOCATOR_TAG
    perception: Mapping[str, object] = field(default_factory=dict)
    lora: Mapping[str, object] | None = None
    quantize_frozen_llm: Literal["int8", "fp8"] | None = None
    """Hold the weights of a frozen LLM in 8 bits, in training and after it; LoRA stays fp32."""
    optimizer: Mapping[str, object] | None = None
    lr_scheduler: Mapping[str, object] | None = None
    init_from_checkpoint: str | None = None
    """A run, saved directory, weights file or hub name whose weights training starts from."""
    encoder_chunk_size_seconds: float | None = None
    """Longer clips are encoded in chunks of this length, each by itself; null: whole."""
    use_nemo_automodel: bool = False
    """NeMo's SALMAutomodel: its parameter names, its keys of `lora`, validation by tokens."""
    nemo_exact: bool = False
    """Reproduce NeMo where its result depends on its own padding (docs/parity.md)."""
    seed: int = 0
    """Seed of the random initialization of weights that are not pretrained."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "model_type": "a marker that Hugging Face tools read",
        "architectures": "a marker that Hugging Face tools read",
        "torch_dtype": "trainer.precision decides the dtype",
        "dtype": "trainer.precision decides the dtype",
        "init_configure_model": "about when NeMo makes its modules",
        "packed_sequences": "about NeMo's padding; the result is the same",
        "automodel_backend": "XLA chooses its kernels when it compiles",
        "sdpa_method": "XLA chooses its kernels when it compiles",
        "compile": "every program is compiled here",
        "moe_metrics": "no supported LLM has experts",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        "trust_remote_code": "code from a checkpoint is never run",
        "aux_loss_coeff": "no supported LLM has experts",
        "train_gate": "no supported LLM has experts",
        "pretrained_s2s_model": "start from another model with model.init_from_checkpoint",
        "pretrained_perception_from_s2s": "start from a model with model.init_from_checkpoint",
    }


@dataclass(frozen=True, kw_only=True)
class SalmAsrDecoderModelConfig(SalmModelConfig):
    """NeMo's `model:` block for SALMWithAsrDecoder."""

    pretrained_asr: str | None = None
    """`.nemo` file (or hub name) of a transducer, whose encoder perception shares. Required."""
    asr_transcript_drop_prob: float = 0.0
    """How often training leaves the transcript of a clip empty."""

    ALIASES: ClassVar[Mapping[str, str]] = {"init_from_path": "init_from_checkpoint"}
    IGNORED: ClassVar[Mapping[str, str]] = {
        **SalmModelConfig.IGNORED,
        "output_dim": "the width of the LLM, which NeMo notes here too",
        "val_save_path": "validation samples are in metrics.jsonl; evaluate.py writes responses",
    }

    def __post_init__(self) -> None:
        if self.pretrained_asr is None:
            raise ValueError("pretrained_asr: name the .nemo file of an RNN-T, TDT or hybrid model")
        if not 0 <= self.asr_transcript_drop_prob <= 1:
            raise ValueError(
                f"asr_transcript_drop_prob={self.asr_transcript_drop_prob} must be in [0, 1]"
            )
        for key in ("use_nemo_automodel", "encoder_chunk_size_seconds"):
            if getattr(self, key):
                raise ValueError(f"{key}={getattr(self, key)} is not supported with {TRANSCRIBING}")
