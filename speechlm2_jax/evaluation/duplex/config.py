"""Arguments of evaluate.py for a duplex model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from speechlm2_jax.evaluation.config import EvalConfig, check_common
from speechlm2_jax.settings import Refusal

_NO_PROMPT = "a duplex model takes no text prompt; remove it"


@dataclass(frozen=True, kw_only=True)
class DuplexEvalConfig:
    """What to evaluate, on which conversations, and where to write the results."""

    pretrained_name: str
    """Run directory, saved model, NeMo or Hugging Face directory, `.ckpt`, or hub name."""
    inputs: str | tuple[str, ...] | None = None
    """Lhotse cuts, SHAR directory, audio file or folder, or a list; null: validation sets."""
    batch_size: int = 16
    """Conversations processed at once by each data-parallel device."""
    output_manifest: str | None = "answers.jsonl"
    audio_folder: str | None = "answers"
    """Folder of the agent's speech: a folder per set, a file per conversation."""
    benchmark_folder: str | None = None
    """Folder of `input.wav` and `output.wav` in the layout of Full-Duplex-Bench; null: none."""
    scoring_asr: str | None = None
    """ASR model (`.nemo` file or hub name) that transcribes the agent's speech; null: none."""
    input_roles: tuple[str, ...] = ("user",)
    """Speakers of the cuts that are the user; by default those of the run's training."""
    output_roles: tuple[str, ...] = ("agent",)
    """Speakers of the cuts that are the agent; by default those of the run's training."""
    verbose: bool = True
    """Print each reference and hypothesis."""
    use_normalizer: str | bool | None = "english"
    device: str = "auto"
    """auto, cpu, gpu (cuda) or tpu; with an index, as in gpu:1, that device alone."""
    devices: int = -1
    """Number of devices, of each process if there are several; -1: all."""
    strategy: object = None
    """How they share the work, as `trainer.strategy`; null: as `EvalConfig.strategy`."""
    tp_size: int = 1
    """NeMo's key: devices that share one copy of the weights."""
    num_nodes: int = 1
    """Above 1 on Cloud TPU hosts, where several processes are found only if they are expected."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["int8", "fp8"] | None = None
    """Hold the LLM's weights in 8 bits, with a scale for each output channel."""
    kv_cache_dtype: Literal["int8", "fp8"] | None = None
    """Hold the KV cache in 8 bits, with a scale for each token and head."""
    report: str | None = "report.html"
    """HTML report to write."""
    report_rows: int = 100
    """Number of conversations, worst first, whose waveforms and audio the report embeds."""

    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **EvalConfig.REFUSED_TORCH,
        "max_new_tokens": "a duplex model generates one token per frame of input; remove it",
        "system_prompt": _NO_PROMPT,
        "user_prompt": _NO_PROMPT,
        "extra_eos_tokens": "a duplex model does not stop at the end of a turn; remove it",
        "use_asr_decoder": ("a duplex model has no ASR decoder; remove it", False),
        "swap_audio": ("not supported for a duplex model; remove it", False),
        "encoder_wer": ("the encoder of a duplex model has no decoder; remove it", False),
    }

    def __post_init__(self) -> None:
        """Checks ranges. Raises ValueError."""
        check_common(self.batch_size, self.report_rows, self.use_normalizer)
