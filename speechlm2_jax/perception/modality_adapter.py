"""Modality adapters: between the speech encoder and the projection to the LLM's width."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.perception.fastconformer import EncoderOutput, FastConformer
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.qformer import QformerAdapter, QformerConfig


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """NeMo's IdentityConnector: the encoder's frames as they are."""

    TARGETS: ClassVar[tuple[str, ...]] = ("IdentityConnector",)
    subsampling_factor: ClassVar[int] = 1

    d_model: int | None = None
    """Width of the encoder's frames; if set, they are projected to the LLM's width."""
    output_dim: int | None = None
    """If set, there is no projection, whatever d_model is."""

    @property
    def is_projected(self) -> bool:
        """Whether NeMo puts a projection behind this adapter."""
        return self.d_model is not None and self.output_dim is None

    def frame_count(self, frames: int) -> int:
        """Counts the output frames: as many as the encoder has."""
        return frames


@dataclass(frozen=True, kw_only=True)
class MultiLayerConfig:
    """NeMo's MultiLayerProjectionConnector block, key by key."""

    TARGETS: ClassVar[tuple[str, ...]] = ("MultiLayerProjectionConnector",)
    subsampling_factor: ClassVar[int] = 1
    is_projected: ClassVar[bool] = False
    heads: ClassVar[Mapping[str, int]] = {}
    WIDTH_KEY: ClassVar[str] = "output_dim"
    """The key that sets the width of the output frames."""

    target_layer_ids: tuple[int, ...]
    """Encoder layers to concatenate; negative ones count from the last."""
    input_dim: int
    """Width of the encoder's frames."""
    output_dim: int
    """Width of the LLM, which overrides this value (as in NeMo)."""
    include_final_output: bool = True
    """Whether to concatenate the encoder's output, too."""

    @property
    def input_width(self) -> int:
        """Width that the encoder's frames must have."""
        return self.input_dim

    @property
    def width(self) -> int:
        """Width of the output frames."""
        return self.output_dim

    @property
    def inputs(self) -> int:
        """Number of encoder layers concatenated, its output included."""
        return len(self.target_layer_ids) + self.include_final_output

    def frame_count(self, frames: int) -> int:
        """Counts the output frames: as many as the encoder has."""
        return frames


AdapterConfig = FastConformerConfig | IdentityConfig | MultiLayerConfig | QformerConfig
READERS_OF_LAYERS = (MultiLayerConfig, QformerConfig)
"""Adapters that take K encoder layers [B, K, T, D] instead of the encoder's output."""


def input_width(adapter: AdapterConfig) -> tuple[str, int | None]:
    """Returns the adapter's key for its input width and its value; None for any width."""
    if isinstance(adapter, QformerConfig):
        return "encoder_config.d_model", adapter.input_width
    if isinstance(adapter, MultiLayerConfig):
        return "input_dim", adapter.input_width
    if isinstance(adapter, FastConformerConfig):
        return "feat_in", adapter.feat_in
    return "d_model", adapter.d_model if adapter.is_projected else None


def layers_read(config: AdapterConfig, n_layers: int) -> tuple[int, ...]:
    """Returns the indices of the encoder layers that an adapter reads, in ascending order.

    Raises ValueError for a layer that the encoder does not have, or one named twice.
    """
    if not isinstance(config, READERS_OF_LAYERS):
        return ()
    ids = config.target_layer_ids
    if not ids or any(not -n_layers <= n < n_layers for n in ids):
        raise ValueError(
            f"modality_adapter.target_layer_ids={list(ids)} must name layers of the encoder, "
            f"which has {n_layers}"
        )
    numbers = tuple(sorted(n % n_layers for n in ids))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"modality_adapter.target_layer_ids={list(ids)} names a layer twice")
    return numbers


class IdentityAdapter(nnx.Module):
    """Returns the encoder's frames unchanged."""

    def __init__(self, config: IdentityConfig, *, rngs: nnx.Rngs):
        del rngs
        self.config = config

    def __call__(
        self,
        features: Float[Array, "B T D"],
        lengths: Int[Array, " B"],
        *,
        train: bool = False,
        rngs: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
    ) -> EncoderOutput:
        """Has the arguments of every adapter; `train` and `rngs` have no effect."""
        del train, rngs
        return EncoderOutput(frames=features, lengths=lengths, statistics={}, extents=extents)


class MultiLayerAdapter(nnx.Module):
    """Concatenates K encoder layers [B, K, T, D] per frame and projects to the LLM's width."""

    def __init__(self, config: MultiLayerConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.input_dim * config.inputs
        self.projection = Linear(width, config.output_dim, axes=(None, "embed"), rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "B K T D"],
        lengths: Int[Array, " B"],
        *,
        train: bool = False,
        rngs: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
    ) -> EncoderOutput:
        """Projects each frame by itself; `train` and `rngs` have no effect."""
        del train, rngs
        batch, layers, length, width = features.shape
        joined = features.swapaxes(1, 2).reshape(batch, length, layers * width)
        return EncoderOutput(
            frames=self.projection(joined), lengths=lengths, statistics={}, extents=extents
        )


Adapter = FastConformer | IdentityAdapter | MultiLayerAdapter | QformerAdapter
ADAPTERS: Mapping[type, type] = {
    FastConformerConfig: FastConformer,
    IdentityConfig: IdentityAdapter,
    MultiLayerConfig: MultiLayerAdapter,
    QformerConfig: QformerAdapter,
}


def make_adapter(config: AdapterConfig, *, rngs: nnx.Rngs) -> Adapter:
    """Builds the adapter that a config describes."""
    return ADAPTERS[type(config)](config, rngs=rngs)
