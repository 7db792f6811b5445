"""Q-Former (Li et al. 2023, BLIP-2) between a speech encoder and an LLM, as in NeMo's connector.

Learnt queries attend to each chosen encoder layer through BERT layers with cross-attention. A
learnt average over the layers, a norm and a projection give a fixed number of LLM frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from speechlm2_jax.layers.dropout import dropout, fold_rngs
from speechlm2_jax.layers.linear import Linear, zeros
from speechlm2_jax.layers.module import param
from speechlm2_jax.layers.norms import LayerNorm
from speechlm2_jax.layers.stack import scan_layers, stack
from speechlm2_jax.perception.fastconformer import EncoderOutput
from speechlm2_jax.perception.frames import is_within
from speechlm2_jax.sharding import constrain

BERT_HIDDEN = 3072
BERT_EPS = 1e-12
BERT_DROPOUT = 0.1
"""Defaults of Hugging Face's BertConfig, which NeMo's connector keeps."""
_normal = jax.nn.initializers.normal(1.0)


@dataclass(frozen=True, kw_only=True)
class QformerEncoderConfig:
    """NeMo's `encoder_config` block of the connector."""

    d_model: int
    """Width of the encoder's frames, and of the queries."""
    encoder_attention_heads: int
    """Heads of the Q-Former."""


@dataclass(frozen=True, kw_only=True)
class QformerLlmConfig:
    """NeMo's `llm_config` block of the connector."""

    hidden_size: int
    """Width of the LLM."""


@dataclass(frozen=True, kw_only=True)
class QformerConfig:
    """NeMo's QformerConnector block, key by key."""

    TARGETS: ClassVar[tuple[str, ...]] = ("QformerConnector",)
    WIDTH_KEY: ClassVar[str] = "llm_config.hidden_size"
    """The key that sets the width of the output frames."""
    subsampling_factor: ClassVar[int] = 1
    is_projected: ClassVar[bool] = False

    prompt_size: int
    """Output frames per clip, however long the clip is."""
    target_layer_ids: tuple[int, ...]
    """Encoder layers to attend to; negative ones count from the last."""
    qformer_num_hidden_layers: int
    encoder_config: QformerEncoderConfig
    llm_config: QformerLlmConfig
    include_final_output: bool = True
    """Whether to attend to the encoder's output, too."""

    def __post_init__(self) -> None:
        heads, width = self.encoder_config.encoder_attention_heads, self.encoder_config.d_model
        if width % heads:
            raise ValueError(
                f"encoder_config.encoder_attention_heads={heads} must divide d_model={width}"
            )
        if self.prompt_size < 1 or self.qformer_num_hidden_layers < 1:
            raise ValueError("prompt_size and qformer_num_hidden_layers must be at least 1")

    @property
    def input_width(self) -> int:
        """Width that the encoder's frames must have."""
        return self.encoder_config.d_model

    @property
    def width(self) -> int:
        """Width of the output frames."""
        return self.llm_config.hidden_size

    @property
    def inputs(self) -> int:
        """Number of encoder layers attended to, its output included."""
        return len(self.target_layer_ids) + self.include_final_output

    @property
    def heads(self) -> Mapping[str, int]:
        """Numbers of attention heads, for checks of a mesh."""
        return {"heads of the Q-Former": self.encoder_config.encoder_attention_heads}

    def frame_count(self, frames: int) -> int:
        """Counts the output frames for `frames` encoder frames; 0 for 0."""
        return self.prompt_size if frames > 0 else 0


class _Attention(nnx.Module):
    """BERT's attention from `x` to `frames`: residual, then norm.

    Einsum letters: c clips, k layers (K), p queries (P), t frames, n heads, h head width.
    """

    def __init__(self, config: QformerConfig, *, rngs: nnx.Rngs):
        self.n_heads = config.encoder_config.encoder_attention_heads
        width = config.encoder_config.d_model
        self.query = Linear(width, width, axes=("heads", "embed"), rngs=rngs)
        self.key = Linear(width, width, axes=("heads", "embed"), rngs=rngs)
        self.value = Linear(width, width, axes=("heads", "embed"), rngs=rngs)
        self.output = Linear(width, width, axes=("embed", "heads"), rngs=rngs)
        self.norm = LayerNorm(width, rngs=rngs, eps=BERT_EPS)

    def __call__(
        self,
        x: Float[Array, "B K P D"],
        frames: Float[Array, "B K T D"],
        key_mask: Bool[Array, "B T"] | None,
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B K P D"]:
        heads = lambda y: y.reshape(*y.shape[:-1], self.n_heads, -1)  # noqa: E731
        query, key, value = heads(self.query(x)), heads(self.key(frames)), heads(self.value(frames))
        # time is the leading axis after c, so that padding changes no draw of dropout
        scores = jnp.einsum("ckpnh,cktnh->ctknp", query, key, preferred_element_type=jnp.float32)
        scores = constrain(scores * key.shape[-1] ** -0.5, "clips", None, None, "act_heads", None)
        mask = None if key_mask is None else key_mask[:, :, None, None, None]
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=1)
        weights = dropout(weights, BERT_DROPOUT, fold_rngs(rngs, 0)).astype(x.dtype)
        if mask is not None:  # a clip without frames gives zeros, not a uniform average
            weights = jnp.where(mask, weights, jnp.zeros((), x.dtype))
        mixed = jnp.einsum("ctknp,cktnh->ckpnh", weights, value).reshape(x.shape)
        return self.norm(x + dropout(self.output(mixed), BERT_DROPOUT, fold_rngs(rngs, 1)))


class _Layer(nnx.Module):
    """One BERT layer: self-attention, cross-attention, feed-forward; each post-norm residual."""

    def __init__(self, config: QformerConfig, *, rngs: nnx.Rngs):
        width = config.encoder_config.d_model
        self.attention = _Attention(config, rngs=rngs)
        self.cross_attention = _Attention(config, rngs=rngs)
        self.hidden = Linear(width, BERT_HIDDEN, axes=("mlp", "embed"), rngs=rngs)
        self.output = Linear(BERT_HIDDEN, width, axes=("embed", "mlp"), rngs=rngs)
        self.norm = LayerNorm(width, rngs=rngs, eps=BERT_EPS)

    def __call__(
        self,
        x: Float[Array, "B K P D"],
        frames: Float[Array, "B K T D"],
        key_mask: Bool[Array, "B T"],
        rngs: Key[Array, " B"] | None,
    ) -> Float[Array, "B K P D"]:
        x = self.attention(x, x, None, fold_rngs(rngs, 0))
        x = self.cross_attention(x, frames, key_mask, fold_rngs(rngs, 1))
        update = self.output(jax.nn.gelu(self.hidden(x), approximate=False))
        return self.norm(x + dropout(update, BERT_DROPOUT, fold_rngs(rngs, 2)))


class QformerAdapter(nnx.Module):
    """K encoder layers [B, K, T, D] -> `prompt_size` frames of the LLM's width per clip."""

    def __init__(self, config: QformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.encoder_config.d_model
        shape = (config.inputs, config.prompt_size, width)
        self.prompts = param(rngs, shape, ("layers", None, "norm"), _normal)
        self.layer_weights = param(rngs, (config.prompt_size, config.inputs), (None, "norm"), zeros)
        self.layers = stack(
            lambda r: _Layer(config, rngs=r), config.qformer_num_hidden_layers, rngs
        )
        self.norm = LayerNorm(width, rngs=rngs)
        self.projection = Linear(width, config.width, axes=(None, "embed"), rngs=rngs)

    def __call__(
        self,
        features: Float[Array, "B K T D"],
        lengths: Int[Array, " B"],
        *,
        train: bool = False,
        rngs: Key[Array, " B"] | None = None,
        extents: Int[Array, " B"] | None = None,
    ) -> EncoderOutput:
        """Attends to the real frames or, if given, to the first `extents` frames of each clip.

        NeMo attends to all frames of its padded batch. Given `rngs`, dropout is on.
        """
        del train
        config = self.config
        key_mask = is_within(lengths if extents is None else extents, features.shape[2])
        prompts = self.prompts[...].astype(features.dtype)
        x = jnp.broadcast_to(prompts[None], (features.shape[0], *prompts.shape))

        def body(layer: _Layer, x: Array, index: Array) -> tuple[Array, None]:
            return layer(x, features, key_mask, fold_rngs(rngs, index)), None

        x, _ = scan_layers(self.layers, body, x, jnp.arange(config.qformer_num_hidden_layers))
        weights = jax.nn.softmax(self.layer_weights[...].astype(jnp.float32), axis=-1)
        mixed = jnp.einsum("ckpd,pk->cpd", x.astype(jnp.float32), weights).astype(x.dtype)
        return EncoderOutput(
            frames=self.projection(self.norm(mixed)),
            lengths=jnp.where(lengths > 0, config.prompt_size, 0),
            statistics={},
        )
