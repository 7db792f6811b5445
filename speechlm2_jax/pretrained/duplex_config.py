"""The `model:` block of the duplex models, with NeMo's keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig


@dataclass(frozen=True, kw_only=True)
class DuplexModelConfig:
    """NeMo's `model:` block for DuplexS2SModel."""

    pretrained_llm: str
    """Hugging Face LLM (directory or hub name) or GGUF file: architecture, tokenizer, weights."""
    pretrained_audio_codec: str
    """`.nemo` file (or hub name) of the audio codec."""
    pretrained_asr: str | None = None
    """`.nemo` file (or hub name) whose preprocessor and encoder initialize perception."""
    scoring_asr: str | None = None
    """`.nemo` file (or hub name) of the ASR model that scores validation; None: no scores."""
    pretrained_weights: bool = True
    """False: components but the codec give their architecture only; weights are random."""
    tokenizer_path: str | None = None
    """Where the tokenizer is, if not with `pretrained_llm`."""
    freeze_params: tuple[str, ...] = ()
    prevent_freeze_params: tuple[str, ...] = ()
    text_loss_weight: float = 1.0
    audio_loss_weight: float = 1.0
    duplex_user_channel_weight: float = 1.0
    """Factor of the user's frames before they are added to the agent's embeddings."""
    perception: Mapping[str, object] = field(default_factory=dict)
    lora: Mapping[str, object] | None = None
    quantize_frozen_llm: Literal["int8", "fp8"] | None = None
    """Hold the weights of a frozen LLM in 8 bits, in training and after it; LoRA stays fp32."""
    optimizer: Mapping[str, object] | None = None
    lr_scheduler: Mapping[str, object] | None = None
    init_from_checkpoint: str | None = None
    """A run, saved directory, weights file or hub name whose weights training starts from; NeMo
    ignores it."""
    nemo_exact: bool = False
    """Reproduce NeMo where its result depends on its own padding (docs/parity.md)."""
    seed: int = 0
    """Seed of the random initialization of weights that are not pretrained."""

    TARGETS: ClassVar[tuple[str, ...]] = ("DuplexS2SModel",)
    IGNORED: ClassVar[Mapping[str, str]] = {
        "model_type": "a marker that Hugging Face tools read",
        "architectures": "a marker that Hugging Face tools read",
        "torch_dtype": "trainer.precision decides the dtype",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        "trust_remote_code": "code from a checkpoint is never run",
        "pretrained_perception_from_s2s": "start from a model with model.init_from_checkpoint",
        "pretrained_s2s_model": "start from another model with model.init_from_checkpoint",
        "speech_decoder": "a model with a speech decoder is model._target_: "
        "DuplexS2SSpeechDecoderModel",
    }


@dataclass(frozen=True, kw_only=True)
class DuplexSpeechDecoderModelConfig(DuplexModelConfig):
    """NeMo's `model:` block for DuplexS2SSpeechDecoderModel."""

    speech_decoder: SpeechDecoderConfig

    TARGETS: ClassVar[tuple[str, ...]] = ("DuplexS2SSpeechDecoderModel",)
    REFUSED: ClassVar[Mapping[str, str]] = {
        key: reason for key, reason in DuplexModelConfig.REFUSED.items() if key != "speech_decoder"
    }
