"""Settings of duplex data: NeMo's keys, with the meaning they have here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from speechlm2_jax.data.config import DataConfig, LoaderConfig
from speechlm2_jax.settings import Refusal

_NO_PROMPT = "a duplex model has no prompt"
_SECONDS = "conversations are measured in seconds"
_LEAVE_OUT = "leave such cuts out of the manifest"


@dataclass(frozen=True, kw_only=True)
class DuplexDataConfig(DataConfig):
    """The `data` block of a duplex model."""

    frame_length: float | None = None
    """Required: seconds of a frame, for which there is a text token and the codec's codes."""
    source_sample_rate: int | None = None
    """Required: Hertz of the user's audio, the speech encoder's."""
    target_sample_rate: int | None = None
    """Required: Hertz of the agent's audio, the codec's."""
    input_roles: tuple[str, ...] | None = None
    """Speakers of supervisions that are the user, spelt exactly so; null: `user`."""
    output_roles: tuple[str, ...] | None = None
    """Speakers of supervisions that are the agent, spelt exactly so; null: `agent`."""


@dataclass(frozen=True, kw_only=True)
class DuplexLoaderConfig(LoaderConfig):
    """One stream of a duplex model: Lhotse cuts of two voices, measured in seconds.

    `sample_rate` is what the user's audio is resampled to first, and what frames are counted by.
    """

    batch_duration: float | None = None
    """Seconds per group: as many rows as fit, by the longest of the bucket."""
    quadratic_duration: float | None = None
    """A length counts as length + length**2 / quadratic_duration against `batch_duration`."""
    # what to leave out
    min_duration: float | None = None
    """Seconds of a conversation."""
    max_duration: float | None = None
    """Seconds of a conversation."""

    BUDGET_KEYS: ClassVar[tuple[str, str]] = ("batch_duration", "quadratic_duration")
    IGNORED: ClassVar[Mapping[str, str]] = {
        **LoaderConfig.IGNORED,
        "lang_field": "the language of a transcript plays no part",
        "pretokenize": "lengths are seconds, so texts are tokenised as they are read",
        "audio_locator_tag": "the channels of a duplex model have no placeholders",
        "token_equivalent_duration": "a frame is data.frame_length",
        "text_field": "texts are those of the cuts' supervisions",
        "measure_total_length": _SECONDS,
        **{
            key: "it goes with concatenate_samples, which is refused"
            for key in (
                "concatenate_gap_seconds",
                "concatenate_duration_factor",
                "concatenate_merge_supervisions",
                "db_norm",
            )
        },
        "bucketing_2d_strict_mode": "bins are one length each",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **LoaderConfig.REFUSED,
        "concatenate_samples": "two dialogs are no longer one; write longer ones into the manifest",
        "perturb_speed": "the agent's voice would be learnt at three pitches, and NeMo changes the "
        "user's recording and the times of turns alone, so that they no longer fit the agent's",
        "prompt_format": _NO_PROMPT,
        "cut_text_into_windows_tokens": _NO_PROMPT,
        "use_multimodal_sampling": f"{_SECONDS}; set batch_duration",
        "batch_tokens": f"{_SECONDS}; set batch_duration",
        "quadratic_factor": f"{_SECONDS}; set quadratic_duration",
        "min_tokens": f"{_SECONDS}; set min_duration",
        "max_tokens": f"{_SECONDS}; set max_duration",
        "min_tpt": (_NO_PROMPT, -1),
        "max_tpt": (_NO_PROMPT, math.inf),
        "min_tps": (_LEAVE_OUT, -1),
        "max_tps": (_LEAVE_OUT, math.inf),
        "max_cer": (_LEAVE_OUT, math.inf),
        "min_context_speaker_similarity": (_LEAVE_OUT, -1),
        "keep": (_LEAVE_OUT, "pass"),
    }
