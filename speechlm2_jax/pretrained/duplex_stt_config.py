"""The `model:` block of the duplex speech-to-text model, with NeMo's keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from speechlm2_jax.networks.stt_channels import TokenWeights


@dataclass(frozen=True, kw_only=True)
class DuplexSttModelConfig:
    """NeMo's `model:` block for DuplexSTTModel."""

    pretrained_llm: str
    """Hugging Face LLM (directory or hub name) or GGUF file: architecture, tokenizer, weights."""
    pretrained_asr: str | None = None
    """`.nemo` file (or hub name) whose preprocessor and encoder initialize perception."""
    pretrained_weights: bool = True
    """False: components give their architecture only; weights are random."""
    source_sample_rate: int | None = None
    """Sampling rate of the user's audio in Hz; must be the speech encoder's."""
    tokenizer_path: str | None = None
    """Where the tokenizer is, if not with `pretrained_llm`."""
    bos_token: str | None = None
    """Token that starts a turn, in place of the tokenizer's."""
    eos_token: str | None = None
    """Token that ends a turn, in place of the tokenizer's."""
    pad_token: str | None = None
    """Token of a frame without text, in place of the tokenizer's."""
    freeze_params: tuple[str, ...] = ()
    prevent_freeze_params: tuple[str, ...] = ()
    predict_user_text: bool = False
    """A second head predicts the user's text (NeMo's ASR head)."""
    text_loss_weight: float = 1.0
    asr_loss_weight: float = 1.0
    """Factor of the loss of the user's text."""
    token_loss_weight: TokenWeights | None = None
    """Factors of the loss by target token: `pad`, `bos`, `eos`, `text`."""
    mask_sequence_loss: bool = True
    """Score up to the end of the text channels only."""
    duplex_user_channel_weight: float = 1.0
    """Factor of the user's frames, and of the system prompt, before all channels are added."""
    duplex_text_channel_weight: float = 1.0
    """Factor of the embeddings of the agent's text."""
    duplex_asr_text_weight: float = 1.0
    """Factor of the embeddings of the user's text."""
    advance_text_channel_by: int | None = None
    """Frames by which training moves the agent's text to the front."""
    delay_text_channel_by: int | None = None
    """Frames by which training moves the agent's text to the end."""
    delay_text_eos_by: int | None = None
    """Frames by which training moves the ends of the agent's turns to the end."""
    delay_text_bos_by: int | None = None
    """Frames by which training moves the starts of the agent's turns to the end."""
    delay_source_text_by: int | None = None
    """Frames by which training moves the user's text to the end."""
    inference_pad_boost: float | None = None
    """Added to the agent's logit of pad in inference."""
    inference_bos_boost: float | None = None
    """Added to the agent's logit of bos in inference."""
    inference_eos_boost: float | None = None
    """Added to the agent's logit of eos in inference."""
    force_turn_taking: bool = False
    """Inference starts and ends the agent's turns by the user's text."""
    force_turn_taking_threshold: int = 40
    """Frames in which a turn that has just begun, or ended, is not forced again."""
    force_turn_taking_pad_window: int = 25
    """Frames of silence after the user's text that start a turn of the agent."""
    user_bos_token: str | None = None
    """A further token that starts the user's turns, of older models."""
    user_eos_token: str | None = None
    """A further token that ends the user's turns, of older models."""
    eval_text_turn_taking: bool = True
    """Generated texts have the times of turns: `<|start|>` and `<$end$>` in seconds."""
    perception: Mapping[str, object] = field(default_factory=dict)
    lora: Mapping[str, object] | None = None
    quantize_frozen_llm: Literal["int8", "fp8"] | None = None
    """Hold the weights of a frozen LLM in 8 bits, in training and after it; LoRA stays fp32."""
    optimizer: Mapping[str, object] | None = None
    lr_scheduler: Mapping[str, object] | None = None
    init_from_checkpoint: str | None = None
    """A run, saved directory, weights file or hub name whose weights training starts from."""
    nemo_exact: bool = False
    """Reproduce NeMo where its result depends on its own padding (docs/parity.md)."""
    seed: int = 0
    """Seed of the random initialization of weights that are not pretrained."""

    TARGETS: ClassVar[tuple[str, ...]] = ("DuplexSTTModel",)
    IGNORED: ClassVar[Mapping[str, str]] = {
        "model_type": "a marker that Hugging Face tools read",
        "architectures": "a marker that Hugging Face tools read",
        "torch_dtype": "trainer.precision decides the dtype",
        "validation_save_path": "exp_manager.explicit_log_dir is the run directory",
        "scoring_asr": "the agent has no speech to transcribe",
        "prediction": "offline_inference takes input_pad_len",
        "llm_attr_name": "the LLM's family tells",
        "embed_tokens_attr_name": "the LLM's family tells",
        "cache_key": "the LLM's family tells",
        "force_align_device": "it goes with force_align_user_text, which is refused",
        "incremental_loading": "weights are always read one by one",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        "trust_remote_code": "code from a checkpoint is never run",
        "pretrained_perception_from_s2s": "start from a model with model.init_from_checkpoint",
        "pretrained_s2s_model": "start from another model with model.init_from_checkpoint",
        "pretrained_audio_codec": "a model with speech is model._target_: DuplexS2SModel",
        "speech_decoder": "a model with speech is model._target_: DuplexS2SSpeechDecoderModel",
        "text_to_text_loss_weight": "texts without audio are not supported in duplex data",
        "force_align_user_text": "write times of words into the user's texts, such as <|12|>",
        "custom_sample_inference": "give the recording to offline_inference",
    }
    SHIFTS: ClassVar[tuple[str, ...]] = (
        "advance_text_channel_by",
        "delay_text_channel_by",
        "delay_text_eos_by",
        "delay_text_bos_by",
        "delay_source_text_by",
    )

    def __post_init__(self) -> None:
        for name in (*self.SHIFTS, "force_turn_taking_threshold", "force_turn_taking_pad_window"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
