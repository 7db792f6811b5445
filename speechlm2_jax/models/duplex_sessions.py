"""Sessions of the user-facing full-duplex models: conversations that go on, one or many."""

from flax import nnx

from speechlm2_jax.generation.duplex import DuplexSamplingConfig
from speechlm2_jax.generation.sampling import SamplingConfig
from speechlm2_jax.inference.sessions.duplex_session import DuplexSession
from speechlm2_jax.inference.sessions.opening import (
    SESSION_WINDOW_S,
    SessionOptions,
    open_pool,
    open_session,
)
from speechlm2_jax.inference.sessions.session_pool import DuplexSessionPool, PoolLimits
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.layers.unstacked import Layered
from speechlm2_jax.models.base import SpeechModel
from speechlm2_jax.networks.duplex import Duplex, DuplexConfig
from speechlm2_jax.pretrained.duplex import DuplexBlueprint


class ModelWithSessions(SpeechModel):
    """A full-duplex model that reads samples as they come."""

    _blueprint: DuplexBlueprint

    def session(
        self,
        *,
        sampling_rate: int | None = None,
        decode_audio: bool = True,
        session_window_s: float = SESSION_WINDOW_S,
        text_sampling: SamplingConfig | None = None,
        audio_sampling: SamplingConfig | None = None,
        seed: int = 0,
    ) -> DuplexSession:
        """Starts a conversation: `for frame in session.push(samples)`; greedy by default.

        `sampling_rate` is that of the samples, by default the model's. A frame attends to the last
        `session_window_s` seconds and to the first frames; a conversation has no end but that of
        `max_frames`. Raises ValueError, naming the setting, for a model that cannot stream, for
        weights on several devices and for a window of less than a frame.
        """
        options = self._session_options(
            *(sampling_rate, decode_audio, session_window_s),
            DuplexSamplingConfig.of(text_sampling, audio_sampling),
            seed,
        )
        return open_session(*self._session_parts(), options)

    def session_pool(
        self,
        slots: int,
        *,
        max_load: float = 0.875,
        decode_audio: bool = True,
        session_window_s: float = SESSION_WINDOW_S,
        text_sampling: SamplingConfig | None = None,
        audio_sampling: SamplingConfig | None = None,
    ) -> DuplexSessionPool:
        """Compiles one step for up to `slots` conversations at once: `pool.join()` starts one.

        Other arguments are as for `session`; they hold for all sessions. `pool.join()` refuses
        another session once the 95th percentile of a step's time exceeds `max_load` times the
        duration of a chunk. Raises ValueError as `session`.
        """
        options = self._session_options(
            *(None, decode_audio, session_window_s),
            DuplexSamplingConfig.of(text_sampling, audio_sampling),
            seed=0,
        )
        limits = PoolLimits(slots=slots, max_load=max_load)
        return open_pool(*self._session_parts(), options, limits)

    def _session_options(
        self,
        sampling_rate: int | None,
        decode_audio: bool,
        window_s: float,
        sampling: DuplexSamplingConfig,
        seed: int,
    ) -> SessionOptions:
        if self.mesh is not None:
            raise ValueError(
                f"a session runs on one device, and the weights lie on {self.mesh.size}; load the "
                "model without `strategy`"
            )
        return SessionOptions(
            tokenizer=self.tokenizer,
            input_hz=sampling_rate or self.sampling_rate,
            decode_audio=decode_audio,
            window_s=window_s,
            sampling=sampling,
            seed=seed,
        )

    def _session_parts(
        self,
    ) -> tuple[nnx.GraphDef[Duplex], DuplexConfig, tuple[Layered, Variables]]:
        weights = (self._decoding_variables(), self._inference_variables())
        return self._graphdef, self._blueprint.network, weights
