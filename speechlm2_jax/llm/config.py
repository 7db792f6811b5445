"""Configuration of a decoder-only language model."""

from dataclasses import dataclass, field

from speechlm2_jax.layers.feed_forward import ACTIVATIONS
from speechlm2_jax.layers.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and options of a pre-norm decoder with rotary positions and a gated feed-forward.

    `conversion` translates Hugging Face's config.json. Raises ValueError for sizes that do not fit
    together.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    """Key and value heads; each serves `heads / kv_heads` query heads."""
    head_width: int
    mlp_width: int
    activation: str = "silu"
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys, before the rotation (Qwen3)."""
    attention_bias: bool = False
    """Biases of query, key and value."""
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    tied: bool = False
    """The output layer is the embedding table."""
    init_std: float = 0.02
    """Standard deviation of the random initial weights; unused where a checkpoint is loaded."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"llm {name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"llm kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.head_width < 2 or self.head_width % 2:
            raise ValueError(
                f"llm head_width={self.head_width} must be even: rotary embedding rotates pairs"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"llm activation={self.activation!r} is not supported; choose among "
                f"{list(ACTIVATIONS)}"
            )
