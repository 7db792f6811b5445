"""NeMo's names of a FastConformer (ConformerEncoder), below `encoder.` or `modality_adapter.`."""

from speechlm2_jax.conversion.mapping import LAYER, Rule, Table
from speechlm2_jax.conversion.transforms import IDENTITY, Recount, Squeeze, Transform
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig

NORMS = {
    "feed_forward_in_norm": "norm_feed_forward1",
    "attention_norm": "norm_self_att",
    "conv_norm": "norm_conv",
    "feed_forward_out_norm": "norm_feed_forward2",
    "output_norm": "norm_out",
    "conv.norm": "conv.batch_norm",  # NeMo keeps this name for the other norms too
}
LINEARS: dict[str, tuple[str, Transform]] = {
    "feed_forward_in.hidden": ("feed_forward1.linear1", IDENTITY),
    "feed_forward_in.output": ("feed_forward1.linear2", IDENTITY),
    "attention.query": ("self_attn.linear_q", IDENTITY),
    "attention.key": ("self_attn.linear_k", IDENTITY),
    "attention.value": ("self_attn.linear_v", IDENTITY),
    "attention.output": ("self_attn.linear_out", IDENTITY),
    "conv.pointwise_in": ("conv.pointwise_conv1", Squeeze((2,))),
    "conv.depthwise": ("conv.depthwise_conv", Squeeze((1,))),
    "conv.pointwise_out": ("conv.pointwise_conv2", Squeeze((2,))),
    "feed_forward_out.hidden": ("feed_forward2.linear1", IDENTITY),
    "feed_forward_out.output": ("feed_forward2.linear2", IDENTITY),
}
"""Layers whose weight has a bias if `use_bias` (the position projection never has one)."""
STATISTICS: dict[str, tuple[str, Transform]] = {
    "running_mean": ("running_mean", IDENTITY),
    "running_var": ("running_var", IDENTITY),
    "batches_tracked": ("num_batches_tracked", Recount()),
}
POSITION_BIASES = {"position_bias_u": "pos_bias_u", "position_bias_v": "pos_bias_v"}


def fastconformer_table(config: FastConformerConfig) -> Table:
    """The whole encoder: subsampling, layers, output projection."""
    rules = [*_subsampling(config), *_layers(config)]
    if config.feat_out > 0 and config.feat_out != config.d_model:
        rules += with_bias("out_proj", "output")
    return Table(tuple(rules))


def _layers(config: FastConformerConfig) -> list[Rule]:
    rules: list[Rule] = []
    for ours, theirs in NORMS.items():
        rules += with_bias(f"layers.{LAYER}.{theirs}", f"layers.{ours}")
    for ours, (theirs, transform) in LINEARS.items():
        pair = with_bias(f"layers.{LAYER}.{theirs}", f"layers.{ours}", transform)
        rules += pair if config.use_bias else pair[:1]
    if config.conv_norm_type == "batch_norm":
        rules += [
            Rule(
                source=f"layers.{LAYER}.conv.batch_norm.{theirs}",
                target=f"layers.conv.norm.{ours}",
                transform=transform,
            )
            for ours, (theirs, transform) in STATISTICS.items()
        ]
    return rules + (_positions(config) if config.is_relative else [])


def _positions(config: FastConformerConfig) -> list[Rule]:
    projection = Rule(
        source=f"layers.{LAYER}.self_attn.linear_pos.weight",
        target="layers.attention.position.weight",
    )
    return [projection, *_position_biases(config)]


def _position_biases(config: FastConformerConfig) -> list[Rule]:
    if config.untie_biases:
        return [
            Rule(source=f"layers.{LAYER}.self_attn.{theirs}", target=f"layers.attention.{ours}")
            for ours, theirs in POSITION_BIASES.items()
        ]
    # One tensor for all layers, which torch's state dict repeats under each.
    return [
        Rule(
            source=f"layers.0.self_attn.{theirs}",
            target=ours,
            aliases=tuple(f"layers.{i}.self_attn.{theirs}" for i in range(1, config.n_layers)),
        )
        for ours, theirs in POSITION_BIASES.items()
    ]


def _subsampling(config: FastConformerConfig) -> list[Rule]:
    """pre_encode.conv.N: the ReLUs between the convolutions take numbers too."""
    if config.is_stacking:
        has_norm = config.subsampling == "stacking_norm"
        norm = with_bias("pre_encode.pre_norm", "subsampling.norm") if has_norm else []
        return norm + with_bias("pre_encode.proj_out", "subsampling.output")
    if config.stages == 0:
        return with_bias("pre_encode", "subsampling.output")
    rules = with_bias("pre_encode.conv.0", "subsampling.conv_in")
    for stage in range(config.stages - 1):
        ours = f"subsampling.stages.{stage}"
        if config.subsampling == "dw_striding":
            rules += with_bias(f"pre_encode.conv.{2 + 3 * stage}", f"{ours}.depthwise")
            taps = Squeeze((2, 3))
            rules += with_bias(f"pre_encode.conv.{3 + 3 * stage}", f"{ours}.pointwise", taps)
        else:
            rules += with_bias(f"pre_encode.conv.{2 + 2 * stage}", f"{ours}.conv")
    return rules + with_bias("pre_encode.out", "subsampling.output")


def with_bias(source: str, target: str, transform: Transform = IDENTITY) -> list[Rule]:
    """Rules of a layer's weight and bias; the transform is the weight's."""
    return [
        Rule(source=f"{source}.weight", target=f"{target}.weight", transform=transform),
        Rule(source=f"{source}.bias", target=f"{target}.bias"),
    ]
