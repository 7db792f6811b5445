"""What stands between the speech encoder and the projection to the LLM's width."""

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.perception.fastconformer import EncoderOutput, FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """NeMo's IdentityConnector: the encoder's frames as they are."""

    TARGETS: ClassVar[tuple[str, ...]] = ("IdentityConnector",)

    d_model: int | None = None
    """Width of the encoder's frames; given, they are projected to the LLM's width."""
    output_dim: int | None = None
    """Given, there is no projection, whatever d_model says."""

    @property
    def is_projected(self) -> bool:
        """Whether NeMo puts a projection behind this adapter."""
        return self.d_model is not None and self.output_dim is None


AdapterConfig = FastConformerConfig | IdentityConfig


class IdentityAdapter(nnx.Module):
    """Hands frames on."""

    def __init__(self, config: IdentityConfig, *, rngs: nnx.Rngs):
        del rngs
        self.config = config

    def __call__(
        self,
        features: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        *,
        train: bool = False,
        keys: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
    ) -> EncoderOutput:
        """Takes what every adapter takes; nothing here trains or draws."""
        del train, keys
        return EncoderOutput(frames=features, lengths=lengths, statistics={}, extents=extents)


ADAPTERS = {FastConformerConfig: FastConformer, IdentityConfig: IdentityAdapter}


def make_adapter(config: AdapterConfig, *, rngs: nnx.Rngs) -> FastConformer | IdentityAdapter:
    """Builds the adapter that a config describes."""
    return ADAPTERS[type(config)](config, rngs=rngs)
