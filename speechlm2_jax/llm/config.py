"""Configuration of a decoder-only language model."""

from dataclasses import dataclass, field
from typing import Literal

from speechlm2_jax.layers.activations import ACTIVATIONS, XIELU
from speechlm2_jax.layers.rope import LongRopeScaling, RopeConfig

Norm = Literal["rms", "rms1p", "layer", "layer1p"]
"""RMSNorm or LayerNorm; `1p`: the factor is 1 + weight (Gemma, Nemotron)."""
BlockKind = Literal["pre", "post", "sandwich", "parallel"]


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Options that may differ between the layers of one decoder."""

    window: int | None = None
    """Sliding window: a token attends to tokens less than `window` positions before it."""
    chunk: int | None = None
    """Chunked attention: a token attends within its own chunk of `chunk` positions."""
    has_rope: bool = True
    """False: no rotary positions (NoPE)."""
    rope: RopeConfig | None = None
    """Rotary settings of this kind; None: those of the decoder."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and options of a decoder-only language model.

    Layer i is of kind `pattern[i % len(pattern)]`. `llm.families` translates Hugging Face's
    config.json. Raises ValueError for sizes that do not fit together.
    """

    family: str = "llama"
    """Hugging Face's model_type. It decides the names of weights; the fields decide the maths."""
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    """Key and value heads; each serves `heads / kv_heads` query heads."""
    head_width: int
    mlp_width: int
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    """Kinds of the first layers; the pattern repeats over all layers."""

    block: BlockKind = "pre"
    """Where the norms are: x + f(norm(x)), x + norm(f(x)), x + norm(f(norm(x))), or, parallel,
    x + attention(norm(x)) + mlp(norm(x)) with one norm."""
    norm: Norm = "rms"
    norm_bias: bool = False
    norm_eps: float = 1e-6
    residual_scale: float = 1.0
    """Factor of the outputs of attention and feed-forward before they are added (Granite)."""

    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: Literal["none", "head", "head_after_rope", "width"] = "none"
    """Norm of queries and keys: per head before or after RoPE, or over the width of all heads."""
    attention_scale: float | None = None
    """Factor of the scores; None: 1 / sqrt(head_width)."""
    attention_softcap: float | None = None
    """Soft cap of attention scores, by tanh (Gemma 2)."""
    query_growth: float = 0.0
    """Queries at position p are multiplied by 1 + growth * log(1 + floor(p / positions)), as in
    Llama 4 and Ministral 3."""
    query_growth_positions: int = 1
    attention_bias: bool = False
    """Biases of query, key and value."""
    output_bias: bool = False
    """Bias of the attention's output projection."""
    fused_qkv: bool = False
    """Query, key and value are one layer in the checkpoint, and so for LoRA (Phi-3)."""

    activation: str = "silu"
    gated: bool = True
    """down(activation(gate(x)) * up(x)); False: down(activation(up(x)))."""
    fused_gate_up: bool = False
    """Gate and up are one layer in the checkpoint, and so for LoRA (Phi-3, GLM)."""
    mlp_bias: bool = False

    tied: bool = False
    """The output layer is the embedding table."""
    head_bias: bool = False
    """The output layer has a bias, tied or not (Phi)."""
    embedding_scale: float = 1.0
    """Factor of the embeddings."""
    scales_all_inputs: bool = False
    """True: the factor applies to audio and text (Granite); False: to text only (Gemma)."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """Soft cap of logits, by tanh (Gemma 2)."""
    init_std: float = 0.02
    """Standard deviation of the random initial weights; unused where a checkpoint is loaded."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"llm {name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"llm kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.activation not in (*ACTIVATIONS, XIELU):
            raise ValueError(
                f"llm activation={self.activation!r} is not supported; choose among "
                f"{[*ACTIVATIONS, XIELU]}"
            )
        for rope in {self.rope, *(kind.rope for kind in self.pattern if kind.rope)}:
            width = rope.rotated(self.head_width)
            if not 2 <= width <= self.head_width or width % 2:
                raise ValueError(
                    f"llm: rotary embedding of {width} of head_width={self.head_width} elements: "
                    "expected an even number from 2 to head_width"
                )
            if isinstance(rope.scaling, LongRopeScaling):
                rope.scaling.check(width // 2)

    def kind(self, layer: int) -> LayerKind:
        """Returns the kind of a layer."""
        return self.pattern[layer % len(self.pattern)]

    def rope_of(self, kind: LayerKind) -> RopeConfig | None:
        """Returns the rotary settings of a kind; None: it has no rotary positions."""
        if not kind.has_rope:
            return None
        return self.rope if kind.rope is None else kind.rope

    def count(self, window: int | None) -> int:
        """Returns the number of layers with this window."""
        return sum(self.kind(layer).window == window for layer in range(self.layers))

    def rank(self, place: int) -> tuple[int, int]:
        """Returns the index of a pattern element among those with its window, and their number."""
        same = [
            other
            for other, kind in enumerate(self.pattern)
            if kind.window == self.pattern[place].window
        ]
        return same.index(place), len(same)

    @property
    def windows(self) -> tuple[int, ...]:
        """Window sizes of the layers, each once."""
        return tuple(dict.fromkeys(k.window for k in self.pattern if k.window is not None))

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_width**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def repeats(self) -> int:
        """Number of whole repetitions of the pattern."""
        return self.layers // len(self.pattern)

    @property
    def remainder(self) -> int:
        """Layers after the last whole pattern."""
        return self.layers % len(self.pattern)
