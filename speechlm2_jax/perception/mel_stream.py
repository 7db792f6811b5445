"""Streaming log-mel features: step by step the frames of one pass over the whole clip."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from speechlm2_jax.perception.log_mel import LogMel, LogMelConfig


@dataclass(frozen=True, kw_only=True)
class MelPlan:
    """Static sizes of a stream. Raises ValueError for normalisation over whole clips."""

    config: LogMelConfig
    frames: int
    """Mel frames per step."""

    def __post_init__(self) -> None:
        if self.config.normalize in ("per_feature", "all_features"):
            raise ValueError(
                f"preprocessor.normalize={self.config.normalize} needs whole clips and cannot "
                "stream; use an encoder trained with NA"
            )

    @property
    def samples(self) -> int:
        """Samples per step."""
        return self.frames * self.config.hop_samples

    @property
    def before(self) -> int:
        """Samples of a frame's window before frame * hop."""
        return self.config.window_start

    @property
    def silenced_end(self) -> int:
        """Samples zeroed at a clip's end: with exact_pad, NeMo masks the shifted waveform."""
        shifts = self.config.exact_pad and self.config.preemph is not None
        return self.config.side_padding if shifts else 0

    @property
    def lead(self) -> int:
        """Frames of step 0 before the start, so that each step has the window of its last frame."""
        ahead = self.config.window_samples - self.before + self.silenced_end
        return max(0, -(-ahead // self.config.hop_samples) - 1)

    @property
    def carry(self) -> int:
        """Past samples in the state: for a step's first window, and one for pre-emphasis."""
        return self.lead * self.config.hop_samples + self.before + 1


def advance(
    log_mel: LogMel,
    plan: MelPlan,
    previous: Float[Array, "B C"],
    audio: Float[Array, "B S"],
    steps: Int[Array, " B"],
    total: Int[Array, " B"],
) -> tuple[Float[Array, "B T M"], Float[Array, "B C"]]:
    """Computes the features of the next samples; samples from `total` on are zeroed.

    Step s gives the frames from s * frames - lead on; negative ones lie before the start.
    """
    wave = jnp.concatenate([previous, audio.astype(jnp.float32)], axis=1)
    position = (steps * plan.samples - plan.carry)[:, None] + jnp.arange(wave.shape[1])[None]
    is_real = position < total[:, None]
    wave = jnp.where(is_real, wave, 0.0)
    emphasised = wave[:, 1:]
    if plan.config.preemph is not None:
        emphasised = emphasised - plan.config.preemph * wave[:, :-1]
        is_kept = position[:, 1:] < total[:, None] - plan.silenced_end
        emphasised = jnp.where(is_kept, emphasised, 0.0)
    return log_mel.features(emphasised, plan.frames), wave[:, plan.samples :]
