"""DuplexS2SSpeechDecoder: the LLM writes the agent's text, a decoder of its own speaks it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.networks.channels import Channels
from speechlm2_jax.networks.duplex import Duplex, DuplexConfig, DuplexModes
from speechlm2_jax.speech_decoder.decoder import SpeechDecoder


class State(NamedTuple):
    """What a conversation remembers."""

    llm: KVCache
    decoder: Any


class DuplexS2SSpeechDecoder(Duplex):
    """Sum of user frame and text token -> LLM -> text head, and an autoregressive speech decoder.

    The LLM never hears its own voice. `code_embedding` and `audio_head` are in NeMo's checkpoints
    and are carried along, unused (NeMo SpeechLM2 DuplexS2SSpeechDecoderModel).
    """

    UNUSED = ("code_embedding.", "audio_head.")

    def __init__(self, config: DuplexConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.speech_decoder is None:
            raise ValueError("this network needs a speech_decoder block")
        self.speech_decoder = SpeechDecoder(
            config.speech_decoder,
            input_width=config.llm.width,
            codebooks=config.books.count,
            codes_per_codebook=config.books.vocab_size,
            rngs=rngs,
        )

    def embed(self, channels: Channels) -> Float[Array, "B T D"]:
        """Sums the user's frame and the text token before it."""
        return self._sum(channels.user, channels.text)

    def speak(
        self,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        modes: DuplexModes,
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B T W"]:
        """Runs the speech decoder over the LLM's hidden states and the codes before each frame."""
        return self.speech_decoder.decode(
            hidden,
            codes,
            train=modes.speech_decoder,
            rngs=rngs if modes.speech_decoder else None,
            remat=self.config.remat.llm,
        )

    def audio_logits(self, hidden: Float[Array, "B T W"]) -> Float[Array, "B T K V"]:
        """Scores every code of every codebook, in fp32."""
        return self.speech_decoder.logits(hidden)

    def new_state(self, batch: int, capacity: int) -> State:
        """Makes the memory of `batch` conversations of up to `capacity` frames."""
        return State(
            llm=self.llm.new_cache(batch, capacity, self.dtype),
            decoder=self.speech_decoder.new_state(batch, capacity, self.dtype),
        )

    def step(
        self,
        state: State,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        codes: Int[Array, "B 1 K"],
    ) -> tuple[Float[Array, "B V"], Float[Array, "B K W"], State]:
        """Runs the next frame: (text logits, audio logits, memory)."""
        rows = text.shape
        extended = self.llm.extend(
            self._sum(user, text),
            state.llm,
            positions=jnp.broadcast_to(state.llm.used, rows),
            attention_mask=jnp.ones(rows, bool),
        )
        spoken = self.speech_decoder.step(state.decoder, extended.hidden, codes)
        after = State(llm=extended.cache, decoder=spoken.state)
        return self.llm.logits(extended.hidden)[:, 0], spoken.logits[:, 0], after

    def _sum(self, user: Float[Array, "B T D"], text: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        said = self.llm.embed(text).astype(self.dtype)
        return said + user.astype(self.dtype) * self.config.user_channel_weight
