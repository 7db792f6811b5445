"""Speaking while listening: a frame of the user in, a text token and K codes out, in one loop."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.generation.sampling import SamplingConfig, choose
from speechlm2_jax.layers.cpu import read_in_place


@dataclass(frozen=True, kw_only=True)
class DuplexSamplingConfig:
    """How to speak; static, so each value is a program of its own."""

    text: SamplingConfig = field(default_factory=SamplingConfig)
    audio: SamplingConfig = field(default_factory=SamplingConfig)

    @property
    def is_random(self) -> bool:
        """Whether random keys are needed."""
        return self.text.do_sample or self.audio.do_sample


@runtime_checkable
class FrameNetwork(Protocol):
    """A network that runs frame by frame (`networks.duplex.Duplex`)."""

    def new_state(self, batch: int, capacity: int) -> Any:
        """Makes an empty memory."""
        ...

    def step(
        self,
        state: Any,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        codes: Int[Array, "B 1 K"],
    ) -> tuple[Float[Array, "B V"], Float[Array, "B K W"], Any]:
        """Runs the next frame."""
        ...


class DuplexOutput(NamedTuple):
    """What the agent says: frame t is chosen when the user's frame t has been heard."""

    text: Int[Array, "B T"]
    codes: Int[Array, "B T K"]


class DuplexState(NamedTuple):
    """The last frame, and how to go on."""

    state: Any
    text: Int[Array, " B"]
    codes: Int[Array, "B K"]
    frame: Int[Array, ""]


def initial_state(
    network: FrameNetwork, batch: int, capacity: int, *, pad: int, delay: int, codebooks: int
) -> DuplexState:
    """A conversation before its first frame: nothing said, the codes delayed."""
    return DuplexState(
        state=network.new_state(batch, capacity),
        text=jnp.full((batch,), pad, jnp.int32),
        codes=jnp.full((batch, codebooks), delay, jnp.int32),
        frame=jnp.zeros((), jnp.int32),
    )


def next_frame(
    network: FrameNetwork,
    said: DuplexState,
    user: Float[Array, "B 1 D"],
    config: DuplexSamplingConfig,
    rngs: Key[Array, " B"] | None = None,
) -> DuplexState:
    """Hears one frame of the user and chooses the agent's next. Draws belong to (row, frame)."""
    text_logits, audio_logits, state = network.step(
        said.state, user, said.text[:, None], said.codes[:, None]
    )
    text_rngs, audio_rngs = _frame_rngs(rngs, said.frame, audio_logits.shape[1])
    flat = audio_logits.reshape(-1, audio_logits.shape[-1])  # [B K, W]
    return DuplexState(
        state=state,
        text=choose(text_logits, config.text, text_rngs),
        codes=choose(flat, config.audio, audio_rngs).reshape(audio_logits.shape[:2]),
        frame=said.frame + 1,
    )


def run_duplex(
    network: FrameNetwork,
    user: Float[Array, "B T D"],
    lengths: Int[Array, " B"],
    said: DuplexState,
    config: DuplexSamplingConfig,
    *,
    pad: int,
    rngs: Key[Array, " B"] | None = None,
) -> DuplexOutput:
    """Runs whole conversations of `lengths` frames; what lies beyond a row's is pad and code 0."""
    frames = user.shape[1]
    text = jnp.full(user.shape[:2], pad, jnp.int32)
    codes = jnp.zeros((*user.shape[:2], said.codes.shape[1]), jnp.int32)
    last = jnp.minimum(jnp.max(lengths, initial=0), frames)

    def is_going_on(carry: tuple[DuplexState, Array, Array]) -> Array:
        return carry[0].frame < last

    def advance(carry: tuple[DuplexState, Array, Array]) -> tuple[DuplexState, Array, Array]:
        said, text, codes = carry
        t = said.frame
        heard = jax.lax.dynamic_slice_in_dim(user, t, 1, axis=1)
        said = next_frame(network, said, heard, config, rngs)
        text = jax.lax.dynamic_update_slice_in_dim(text, said.text[:, None], t, axis=1)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, said.codes[:, None], t, axis=1)
        return said, text, codes

    with read_in_place(network):
        _, text, codes = jax.lax.while_loop(is_going_on, advance, (said, text, codes))
    is_real = jnp.arange(frames)[None] < lengths[:, None]
    return DuplexOutput(
        text=jnp.where(is_real, text, pad), codes=jnp.where(is_real[..., None], codes, 0)
    )


def _frame_rngs(
    rngs: Key[Array, " B"] | None, frame: Int[Array, ""], codebooks: int
) -> tuple[Any, Any]:
    if rngs is None:
        return None, None
    of_frame = jax.vmap(lambda key: jax.random.fold_in(key, frame))(rngs)
    parts = jax.vmap(lambda key: jax.random.split(key, codebooks + 1))(of_frame)  # [B, K + 1]
    return parts[:, 0], parts[:, 1:].reshape(-1)
