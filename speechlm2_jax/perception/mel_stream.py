"""Log-mel features of a stream: the frames of one pass, as the samples of each come in."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from speechlm2_jax.perception.log_mel import LogMel, LogMelConfig


@dataclass(frozen=True, kw_only=True)
class MelPlan:
    """Static sizes of a stream. Raises ValueError for features that look at whole clips."""

    config: LogMelConfig
    frames: int
    """Features of a step."""

    def __post_init__(self) -> None:
        if self.config.normalize in ("per_feature", "all_features"):
            raise ValueError(
                f"preprocessor.normalize={self.config.normalize} looks at whole clips; a stream "
                "needs an encoder that was trained with NA"
            )

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.frames * self.config.hop_samples

    @property
    def before(self) -> int:
        """Samples that a frame's window reaches back from frame x hop."""
        return self.config.window_start

    @property
    def silenced_end(self) -> int:
        """Samples at a clip's end that are silenced: NeMo's exact_pad masks what it has shifted."""
        shifts = self.config.exact_pad and self.config.preemph is not None
        return self.config.side_padding if shifts else 0

    @property
    def lead(self) -> int:
        """Places of step 0 that lie before the beginning: a step holds the last frame's window."""
        ahead = self.config.window_samples - self.before + self.silenced_end
        return max(0, -(-ahead // self.config.hop_samples) - 1)

    @property
    def carry(self) -> int:
        """Samples that a stream remembers: the first window of a step, and one for pre-emphasis."""
        return self.lead * self.config.hop_samples + self.before + 1


def advance(
    log_mel: LogMel,
    plan: MelPlan,
    previous: Float[Array, "B C"],
    audio: Float[Array, "B S"],
    steps: Int[Array, " B"],
    total: Int[Array, " B"],
) -> tuple[Float[Array, "B T M"], Float[Array, "B C"]]:
    """Computes the features of the next samples; those from `total` on are silence.

    Step s gives the frames s x frames - lead and on, also such as are before the beginning.
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
