"""DuplexS2S: the LLM reads user audio, agent text and agent codes; two heads predict the agent."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.networks.channels import Channels
from speechlm2_jax.networks.duplex import Duplex, DuplexModes


class DuplexS2S(Duplex):
    """Sum of user frame, text token and K codes -> LLM -> text head and audio head."""

    def embed(self, channels: Channels) -> Float[Array, "B T D"]:
        """Sums the embeddings of the user frame, the text token and the previous codes."""
        return self._sum(channels.user, channels.text, channels.codes)

    def audio_hidden(
        self,
        hidden: Float[Array, "B T D"],
        codes: Int[Array, "B T K"] | None,
        modes: DuplexModes,
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B T D"]:
        """Returns the LLM's hidden states: both heads read them."""
        return hidden

    def audio_logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T K V"]:
        """Computes the logits of every code of every codebook, in fp32."""
        return self.split_codebooks(self.audio_head(hidden).astype(jnp.float32))

    def new_state(self, batch: int, capacity: int, sinks: int | None = None) -> KVCache:
        """Makes the KV cache of `batch` conversations; see `Duplex.new_state`."""
        return self.new_cache(batch, capacity, sinks)

    def decode_frame(
        self,
        state: KVCache,
        user: Float[Array, "B 1 D"],
        text: Int[Array, "B 1"],
        codes: Int[Array, "B 1 K"],
        is_real: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B K W"], KVCache]:
        """Runs the next frame. Returns text logits, audio logits and the new KV cache."""
        mask = jnp.ones(text.shape, bool) if is_real is None else is_real[:, None]
        extended = self.llm.extend(
            self._sum(user, text, codes),
            state,
            positions=jnp.broadcast_to(state.used[..., None], text.shape),
            attention_mask=mask,
        )
        hidden = extended.hidden
        return self.llm.logits(hidden)[:, 0], self.audio_logits(hidden)[:, 0], extended.cache

    def _sum(
        self, user: Float[Array, "B T D"], text: Int[Array, "B T"], codes: Int[Array, "B T K"]
    ) -> Float[Array, "B T D"]:
        agent = self.code_embedding(codes, self.llm.embed(text).astype(self.dtype))
        return agent + user.astype(self.dtype) * self.config.user_channel_weight
