"""The words of evaluate.py's command line where the model is a duplex one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from speechlm2_jax.evaluation.config import EvalConfig, check_common

_NO_PROMPT = "a duplex model is asked by voice alone; remove it"


@dataclass(frozen=True, kw_only=True)
class DuplexEvalConfig:
    """What to listen to, with what, and where to write what was said."""

    pretrained_name: str
    """Run directory, saved model, NeMo or Hugging Face directory, `.ckpt`, or hub name."""
    inputs: str | tuple[str, ...] | None = None
    """Lhotse cuts, SHAR directory, audio file or folder of them, or a list; a run's own sets."""
    batch_size: int = 16
    output_manifest: str | None = "answers.jsonl"
    audio_folder: str | None = "answers"
    """Where the agent's speech goes, a file per conversation in a folder per set."""
    scoring_asr: str | None = None
    """`.nemo` file (or hub name) of what writes the agent's speech down; null: it is not heard."""
    input_roles: tuple[str, ...] = ("user",)
    """Speakers of the cuts that are the user; of a run, those that it was trained with."""
    output_roles: tuple[str, ...] = ("agent",)
    """Speakers of the cuts that are the agent; of a run, those that it was trained with."""
    verbose: bool = True
    """Print each reference and answer."""
    use_normalizer: str | bool | None = "english"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    report: str | None = "report.html"
    """Where to write the page to look at and listen to."""
    report_rows: int = 100
    """How many conversations of the page, the worst, have waveforms and audio."""

    REFUSED: ClassVar[Mapping[str, Any]] = {
        **EvalConfig.REFUSED_TORCH,
        "max_new_tokens": "a duplex model speaks as long as it listens; remove it",
        "system_prompt": _NO_PROMPT,
        "user_prompt": _NO_PROMPT,
        "extra_eos_tokens": "a duplex model goes on after the end of a turn; remove it",
        "swap_audio": ("a duplex model's audio cannot be swapped yet; remove it", False),
        "encoder_wer": ("the encoder of a duplex model has no decoder; remove it", False),
    }

    def __post_init__(self) -> None:
        """Checks ranges. Raises ValueError."""
        check_common(self.batch_size, self.report_rows, self.use_normalizer)
