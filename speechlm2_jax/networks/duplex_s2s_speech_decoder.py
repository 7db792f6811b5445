"""DuplexS2SSpeechDecoder: the LLM predicts agent text, a speech decoder predicts audio codes."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.networks.channels import Channels
from speechlm2_jax.networks.duplex import Duplex, DuplexConfig, DuplexModes
from speechlm2_jax.speech_decoder.decoder import SpeechDecoder
from speechlm2_jax.speech_decoder.transformer import TransformerState


class State(NamedTuple):
    """Decoding state: the KV cache of the LLM and the state of the speech decoder."""

    llm: KVCache
    decoder: TransformerState


class DuplexS2SSpeechDecoder(Duplex):
    """Sum of user frame and text token -> LLM -> text head, and an autoregressive speech decoder.

    The LLM does not read the agent's audio codes. `code_embedding` and `audio_head` are unused:
    they exist because NeMo's checkpoints hold them (NeMo SpeechLM2 DuplexS2SSpeechDecoderModel).
    """

    UNUSED = ("code_embedding.", "audio_head.")
    """Prefixes of the unused variables."""

    def __init__(self, config: DuplexConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.speech_decoder is None:
            raise ValueError(
                "speech_decoder: expected a block, got none; add it to the model config"
            )
        self.speech_decoder = SpeechDecoder(
            config.speech_decoder,
            input_width=config.llm.width,
            codebooks=config.codebooks.count,
            codes_per_codebook=config.codebooks.vocab_size,
            rngs=rngs,
        )

    def embed(self, channels: Channels) -> Float[Array, "B T D"]:
        """Sums the embeddings of the user frame and the text token."""
        return self._sum(channels.user, channels.text)

    def audio_hidden(
        self,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        modes: DuplexModes,
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B T W"]:
        """Runs the speech decoder over the LLM's hidden states and the previous codes."""
        return self.speech_decoder.decode(
            hidden,
            codes,
            train=modes.speech_decoder,
            rngs=rngs if modes.speech_decoder else None,
            remat=self.config.remat.llm,
        )

    def audio_logits(self, hidden: Float[Array, "B T W"]) -> Float[Array, "B T K V"]:
        """Computes the logits of every code of every codebook, in fp32."""
        return self.speech_decoder.logits(hidden)

    def new_state(self, batch: int, capacity: int, sinks: int | None = None) -> State:
        """Makes the initial decoding state of `batch` conversations; see `Duplex.new_state`."""
        return State(
            llm=self.new_cache(batch, capacity, sinks),
            decoder=self.speech_decoder.new_state(batch, capacity, self.dtype, sinks=sinks),
        )

    def decode_frame(
        self,
        state: State,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        codes: Int[Array, "B 1 K"],
        is_real: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B K W"], State]:
        """Runs the next frame. Returns text logits, audio logits and the new state."""
        mask = jnp.ones(text.shape, bool) if is_real is None else is_real[:, None]
        extended = self.llm.extend(
            self._sum(user, text),
            state.llm,
            positions=jnp.broadcast_to(state.llm.used[..., None], text.shape),
            attention_mask=mask,
        )
        decoded = self.speech_decoder.step(
            state.decoder, extended.hidden, codes, mask=None if is_real is None else mask
        )
        new_state = State(llm=extended.cache, decoder=decoded.state)
        return self.llm.logits(extended.hidden)[:, 0], decoded.logits[:, 0], new_state

    def _sum(self, user: Float[Array, "B T D"], text: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        agent = self.llm.embed(text).astype(self.dtype)
        return agent + user.astype(self.dtype) * self.config.user_channel_weight
