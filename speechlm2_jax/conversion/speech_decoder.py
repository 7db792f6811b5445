"""NeMo's names of TransformerARSpeechDecoder and of its transformer (transformer_2501)."""

from speechlm2_jax.conversion.mapping import LAYER, Ignored, Rule, Table
from speechlm2_jax.conversion.transforms import IDENTITY, Permute, Transform
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig

TAPS_BEFORE_INPUTS = Permute((0, 2, 1))
LAYERS: dict[str, tuple[str, Transform]] = {
    "norm_self.weight": ("attention_norm.weight", IDENTITY),
    "self_attention.qkv_net.weight": ("attention.inputs.weight", IDENTITY),
    "self_attention.o_net.weight": ("attention.output.weight", IDENTITY),
    "norm_pos_ff.weight": ("feed_forward_norm.weight", IDENTITY),
    "pos_ff.proj.conv.weight": ("feed_forward.hidden.weight", TAPS_BEFORE_INPUTS),
    "pos_ff.o_net.conv.weight": ("feed_forward.output.weight", TAPS_BEFORE_INPUTS),
}
"""NeMo's name in a layer -> ours."""
CROSS_ATTENTION: dict[str, tuple[str, Transform]] = {
    "norm_xattn_query.weight": ("cross_norm.weight", IDENTITY),
    "cross_attention.q_net.weight": ("cross_attention.query.weight", IDENTITY),
    "cross_attention.kv_net.weight": ("cross_attention.memory.weight", IDENTITY),
    "cross_attention.o_net.weight": ("cross_attention.output.weight", IDENTITY),
}
MEMORY_NORM: dict[str, tuple[str, Transform]] = {
    "norm_xattn_memory.weight": ("memory_norm.weight", IDENTITY),
}
CAUSAL_MASK = Ignored(
    r"layers\.\d+\.self_attention\.causal_mask",
    "a triangle of ones, 100 MB a layer at 5,000 steps; here what is visible is computed",
)


def speech_decoder_table(config: SpeechDecoderConfig, *, is_projected: bool) -> Table:
    """The whole module, below `speech_generation.`.

    `is_projected`: the LLM's width differs from the decoder's.
    """
    linears = {"final_proj": "head"} | ({"input_proj": "projection"} if is_projected else {})
    rules = [
        Rule(source=f"{theirs}.{kind}", target=f"{ours}.{kind}")
        for theirs, ours in linears.items()
        for kind in ("weight", "bias")
    ]
    if config.cond_on_prev_audio_tokens:
        rules.append(
            Rule(source=f"audio_embeddings.{LAYER}.weight", target="code_embeddings.weight")
        )
    transformer = transformer_table(config)
    return Table(tuple(rules)) + transformer.prefixed(source="t5_decoder.", target="transformer.")


def transformer_table(config: SpeechDecoderConfig) -> Table:
    """The transformer alone."""
    layers = LAYERS | (CROSS_ATTENTION if config.has_xattn else {})
    if config.has_xattn and config.apply_norm_to_cond:
        layers = layers | MEMORY_NORM
    rules = [
        Rule(source=f"layers.{LAYER}.{theirs}", target=f"layers.{ours}", transform=transform)
        for theirs, (ours, transform) in layers.items()
    ]
    if config.use_learnable_pos_emb:
        rules.append(Rule(source="position_embeddings.weight", target="positions"))
    if config.apply_norm_out:
        rules.append(Rule(source="norm_out.weight", target="norm.weight"))
    return Table(tuple(rules), (CAUSAL_MASK,))
