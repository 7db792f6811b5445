"""Settings of the speech decoder, under NeMo's key names."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

_ONLY_WITH_MOE = "only read with use_moe, which is refused"
_OTHER_NAMES = {
    "n_layers": ("num_layers", "num_decoder_layers", "n_layer", "num_hidden_layers"),
    "d_model": ("hidden_size", "d_embed"),
    "d_ffn": ("d_ff", "ffn_hidden_size", "intermediate_size", "d_inner"),
    "sa_n_heads": ("num_heads", "n_heads", "n_head", "num_attention_heads"),
    "p_dropout": ("dropout_rate", "dropout", "hidden_dropout", "attention_dropout", "dropatt"),
    "is_causal": ("is_decoder",),
    "max_length_causal_mask": ("max_position_embeddings", "n_positions", "max_seq_len"),
}
"""Our key -> its names in T5, Megatron and FastPitch."""
_WITHOUT_KEY = {
    "d_kv": "heads are d_model / sa_n_heads wide",
    "kv_channels": "heads are d_model / sa_n_heads wide",
    "d_head": "heads are d_model / sa_n_heads wide",
    "relative_attention_num_buckets": "positions are learnt (use_learnable_pos_emb) or none",
    "relative_attention_max_distance": "positions are learnt (use_learnable_pos_emb) or none",
    "feed_forward_proj": "the feed-forward is two convolutions with a tanh GELU",
}


@dataclass(frozen=True, kw_only=True)
class SpeechDecoderConfig:
    """NeMo's `speech_decoder:` block, key by key, with NeMo's defaults.

    Raises ValueError for sizes that do not fit together.
    """

    IGNORED: ClassVar[Mapping[str, str]] = {
        "make_prior_window_strict": "only read with a prior on cross-attention; not supported",
        "num_experts": _ONLY_WITH_MOE,
        "top_k_experts": _ONLY_WITH_MOE,
        "router_jitter_noise": _ONLY_WITH_MOE,
        "routing_strategy": _ONLY_WITH_MOE,
    }
    REFUSED: ClassVar[Mapping[str, str | tuple[object, ...]]] = MappingProxyType(
        {
            "use_moe": (
                "experts in the speech decoder are not supported; set it to false",
                False,
            ),
            "conv_non_linearity": "the activation is always the tanh GELU; remove the key",
            **{
                other: f"the speech decoder's key is {key}"
                for key, others in _OTHER_NAMES.items()
                for other in others
            },
            **_WITHOUT_KEY,
        }
    )

    n_layers: int
    d_model: int
    d_ffn: int
    """Width between the two convolutions of the feed-forward."""
    sa_n_heads: int
    """Heads of self-attention."""
    kernel_size: int
    """Kernel size of the feed-forward's convolutions."""
    p_dropout: float = 0.0
    """Dropout of inputs, attention weights and the output of each block."""
    p_dropout_out: float = 0.0
    has_xattn: bool = False
    """Cross-attention in every layer; skipped when no memory is passed."""
    xa_d_memory: int | None = None
    """Width of the memory; required with has_xattn."""
    xa_n_heads: int | None = None
    """Heads of cross-attention; required with has_xattn."""
    xa_d_head: int | None = None
    """Head width of cross-attention; d_model / xa_n_heads if null."""
    is_causal: bool = True
    apply_norm_to_cond: bool = True
    """Normalise the memory."""
    apply_norm_out: bool = False
    max_length_causal_mask: int = 4096
    """Number of learnt positions. Has no effect without learnt positions."""
    use_learnable_pos_emb: bool = False
    cfg_unconditional_prob: float | None = None
    """Probability of training a sequence without the LLM's hidden states.

    If not 0, inference uses classifier-free guidance with cfg_scale."""
    cfg_scale: float = 2.5
    """Guided logits: (1 - cfg_scale) * unconditional + cfg_scale * conditional."""
    cond_on_prev_audio_tokens: bool = True
    """Whether to add the mean embedding of the previous frame's codes."""
    detach_input: bool = False
    """Whether to stop the gradient to the LLM."""

    def __post_init__(self) -> None:
        for key in ("n_layers", "d_model", "d_ffn", "sa_n_heads", "kernel_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.d_model % self.sa_n_heads:
            raise ValueError(f"sa_n_heads={self.sa_n_heads} must divide d_model={self.d_model}")
        if not self.is_causal and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd unless is_causal")
        if self.max_length_causal_mask < 1:
            raise ValueError(
                f"max_length_causal_mask={self.max_length_causal_mask} must be at least 1"
            )
        for key in ("p_dropout", "p_dropout_out"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(f"{key}={getattr(self, key)} must be in [0, 1)")
        if not 0.0 <= (self.cfg_unconditional_prob or 0.0) <= 1.0:
            raise ValueError(
                f"cfg_unconditional_prob={self.cfg_unconditional_prob} must be in [0, 1]"
            )
        _check_cross_attention(self)

    @property
    def is_guided(self) -> bool:
        """Whether inference uses classifier-free guidance."""
        return bool(self.cfg_unconditional_prob)

    @property
    def memory_width(self) -> int:
        """Width of the memory; 0 without cross-attention."""
        return self.xa_d_memory or 0

    @property
    def cross_heads(self) -> int:
        """Heads of cross-attention."""
        return self.xa_n_heads or 1

    @property
    def cross_head_width(self) -> int:
        """Width of each head of cross-attention."""
        return self.xa_d_head or self.d_model // self.cross_heads


def _check_cross_attention(config: SpeechDecoderConfig) -> None:
    if not config.has_xattn:
        return
    for key in ("xa_d_memory", "xa_n_heads"):
        if not getattr(config, key):
            raise ValueError(f"has_xattn needs {key}; set {key}, or has_xattn to false")
    if config.d_model % config.cross_heads:
        raise ValueError(f"xa_n_heads={config.xa_n_heads} must divide d_model={config.d_model}")
