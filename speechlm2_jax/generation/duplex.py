"""Full-duplex generation: each user frame in gives one text token and K audio codes out."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from speechlm2_jax.generation.sampling import SamplingConfig, choose
from speechlm2_jax.layers.unstacked import read_in_place


@dataclass(frozen=True, kw_only=True)
class DuplexSamplingConfig:
    """Sampling of both channels. Static: each value compiles its own program."""

    text: SamplingConfig = field(default_factory=SamplingConfig)
    audio: SamplingConfig = field(default_factory=SamplingConfig)

    @classmethod
    def of(
        cls, text: SamplingConfig | None, audio: SamplingConfig | None
    ) -> "DuplexSamplingConfig":
        """Makes one of optional settings; None: greedy."""
        return cls(text=text or SamplingConfig(), audio=audio or SamplingConfig())

    @property
    def is_random(self) -> bool:
        """Whether random keys are needed."""
        return self.text.do_sample or self.audio.do_sample


@runtime_checkable
class FrameNetwork(Protocol):
    """A network that decodes frame by frame (`networks.duplex.Duplex`)."""

    def new_state(self, batch: int, capacity: int, sinks: int | None = None) -> PyTree:
        """Makes the initial state of the network, with `sinks` for conversations without end."""
        ...

    def decode_frame(
        self,
        state: PyTree,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        codes: Int[Array, "B 1 K"],
        is_real: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B K W"], PyTree]:
        """Runs the next frame. Returns text logits, audio logits and the new state.

        Conversations whose frame is not real keep their state.
        """
        ...


class DuplexOutput(NamedTuple):
    """Text tokens and audio codes of the agent. Frame t depends on user frames up to t."""

    text: Int[Array, "B T"]
    codes: Int[Array, "B T K"]


class DuplexState(NamedTuple):
    """State of the decoding loop after some frame."""

    network: PyTree
    """State of the network (KV caches)."""
    text: Int[Array, " B"]
    """Text token of the last frame."""
    codes: Int[Array, "B K"]
    """Audio codes of the last frame."""
    frame: Int[Array, ""] | Int[Array, " B"]
    """Number of frames so far; with sinks each conversation has its own."""


def initial_state(
    network: FrameNetwork,
    batch: int,
    capacity: int,
    *,
    pad: int,
    delay: int,
    codebooks: int,
    sinks: int | None = None,
) -> DuplexState:
    """The state before the first frame: pad token and delay codes."""
    return DuplexState(
        network=network.new_state(batch, capacity, sinks),
        text=jnp.full((batch,), pad, jnp.int32),
        codes=jnp.full((batch, codebooks), delay, jnp.int32),
        frame=jnp.zeros(() if sinks is None else batch, jnp.int32),
    )


def next_frame(
    network: FrameNetwork,
    state: DuplexState,
    user: Float[Array, "B 1 D"],
    config: DuplexSamplingConfig,
    rngs: Key[Array, " B"] | None = None,
    is_real: Bool[Array, " B"] | None = None,
) -> DuplexState:
    """Runs one user frame and chooses the agent's next text token and codes.

    A random draw depends on the conversation's key and the frame only. Conversations whose frame is
    not real keep their state, which must be one with `sinks`; None: all are real.
    """
    text_logits, audio_logits, network_state = network.decode_frame(
        state.network, user, state.text[:, None], state.codes[:, None], is_real
    )
    text_rngs, audio_rngs = _frame_rngs(rngs, state.frame, audio_logits.shape[1])
    flat = audio_logits.reshape(-1, audio_logits.shape[-1])  # [B K, W]
    text = choose(text_logits, config.text, text_rngs)
    codes = choose(flat, config.audio, audio_rngs).reshape(audio_logits.shape[:2])
    if is_real is None:
        return DuplexState(network_state, text, codes, state.frame + 1)
    return DuplexState(
        network=network_state,
        text=jnp.where(is_real, text, state.text),
        codes=jnp.where(is_real[:, None], codes, state.codes),
        frame=state.frame + is_real,
    )


def run_duplex(
    network: FrameNetwork,
    user: Float[Array, "B T D"],
    lengths: Int[Array, " B"],
    state: DuplexState,
    config: DuplexSamplingConfig,
    *,
    pad: int,
    rngs: Key[Array, " B"] | None = None,
) -> DuplexOutput:
    """Runs whole conversations of `lengths` frames; later frames get the pad token and code 0."""
    frames = user.shape[1]
    text = jnp.full(user.shape[:2], pad, jnp.int32)
    codes = jnp.zeros((*user.shape[:2], state.codes.shape[1]), jnp.int32)
    last = jnp.minimum(jnp.max(lengths, initial=0), frames)

    def is_unfinished(carry: tuple[DuplexState, Array, Array]) -> Array:
        return carry[0].frame < last

    def advance(carry: tuple[DuplexState, Array, Array]) -> tuple[DuplexState, Array, Array]:
        state, text, codes = carry
        t = state.frame
        user_frame = jax.lax.dynamic_slice_in_dim(user, t, 1, axis=1)
        state = next_frame(network, state, user_frame, config, rngs)
        text = jax.lax.dynamic_update_slice_in_dim(text, state.text[:, None], t, axis=1)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, state.codes[:, None], t, axis=1)
        return state, text, codes

    network = read_in_place(network)
    _, text, codes = jax.lax.while_loop(is_unfinished, advance, (state, text, codes))
    is_real = jnp.arange(frames)[None] < lengths[:, None]
    return DuplexOutput(
        text=jnp.where(is_real, text, pad), codes=jnp.where(is_real[..., None], codes, 0)
    )


def _frame_rngs(
    rngs: Key[Array, " B"] | None,
    frame: Int[Array, ""] | Int[Array, " B"],
    codebooks: int,
) -> tuple[Key[Array, " B"], Key[Array, " BK"]] | tuple[None, None]:
    """Random keys [B] for the text tokens and [B K] for the codes of one frame."""
    if rngs is None:
        return None, None
    of_frame = jax.vmap(jax.random.fold_in)(rngs, jnp.broadcast_to(frame, rngs.shape))
    each = jax.vmap(lambda rng: jax.random.split(rng, codebooks + 1))(of_frame)  # [B, K + 1]
    return each[:, 0], each[:, 1:].reshape(-1)
