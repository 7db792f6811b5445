"""Streaming FastConformer: fixed-size steps whose outputs equal one pass over the whole clip.

Each layer's state keeps the past inputs that later outputs need. A layer with right context
(look-ahead) delays its output by as many frames, so that each output sees all that it sees in a
whole pass: step s of `frames` frames outputs the positions from s * frames - delay on. Positions
before the start or past the end of a stream are zero, like the padding of a whole pass.

(NeMo's cache_aware_stream_step pads while its feature cache is not full, and drops the look-ahead;
its first frames then differ from those of its own whole pass.)
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.layers.stack import scan_layers
from speechlm2_jax.layers.words import floats
from speechlm2_jax.perception.conformer_layer import ConformerLayer
from speechlm2_jax.perception.encoder_plan import EncoderPlan
from speechlm2_jax.perception.fastconformer import FastConformer
from speechlm2_jax.perception.frame_mask import FrameMask, attention_mask, distances
from speechlm2_jax.perception.self_attention import (
    Biases,
    RelPosSelfAttention,
    attention_weights,
    content_scores,
    mix,
)
from speechlm2_jax.perception.subsampling import (
    FullStage,
    HalvingConv,
    SeparableStage,
    Stacking,
    Subsampling,
)
from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class EncoderStreamState:
    """State of an encoder for a batch of streams; all zeros at the start of a stream."""

    inputs: tuple[Float[Array, "B ..."], ...]
    """Per subsampling stage [B, carry, ...]: its last input frames."""
    keys: Float[Array, "L B C N H"]
    """[L, B, C, N, H]: key cache, C = plan.cache."""
    values: Float[Array, "L B C N H"]
    """[L, B, C, N, H]: value cache."""
    attention_queue: Float[Array, "L B attention_delay D"]
    """[L, B, attention_delay, D]: frames that wait for the look-ahead of attention."""
    gated: Float[Array, "L B taps D"]
    """[L, B, k - 1, D]: last inputs of the depthwise convolution."""
    conv_queue: Float[Array, "L B conv_delay D"]
    """[L, B, conv_delay, D]: frames that wait for the look-ahead of the convolution."""

    STACKED: ClassVar[tuple[str, ...]] = (
        "keys",
        "values",
        "attention_queue",
        "gated",
        "conv_queue",
    )
    """Fields with a leading layer axis: their batch axis is the second."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Inputs of one layer besides its frames; only `positions` differs between layers."""

    positions: Int[Array, "B F"]
    """Positions of the layer's input frames."""
    frame_mask: FrameMask
    tied_biases: Biases | None


@register_pytree
@dataclass(frozen=True, kw_only=True)
class StreamFrames:
    """Output frames of one step."""

    frames: Float[Array, "B F W"]
    is_real: Bool[Array, "B F"]
    """False before the start and past the end of a stream."""
    lengths: Int[Array, " B"]
    """Total frames of each stream if it ended here."""
    captured: Float[Array, "B K F W"] | None = None


def new_state(plan: EncoderPlan, batch: int, dtype: DTypeLike = jnp.float32) -> EncoderStreamState:
    """Makes the state of `batch` new streams."""
    config = plan.config
    layers, width = config.n_layers, config.d_model
    head = (config.n_heads, width // config.n_heads)
    kernel = config.conv_kernel_size

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, dtype)

    return EncoderStreamState(
        inputs=tuple(zeros(batch, *shape) for shape in _carry_shapes(plan)),
        keys=zeros(layers, batch, plan.cache, *head),
        values=zeros(layers, batch, plan.cache, *head),
        attention_queue=zeros(layers, batch, plan.attention_delay, width),
        gated=zeros(layers, batch, kernel - 1, width),
        conv_queue=zeros(layers, batch, plan.conv_delay, width),
    )


def advance(
    encoder: FastConformer,
    plan: EncoderPlan,
    state: EncoderStreamState,
    features: Float[Array, "B I M"],
    steps: Int[Array, " B"],
    total: Int[Array, " B"],
    *,
    capture: tuple[int, ...] = (),
) -> tuple[StreamFrames, EncoderStreamState]:
    """Encodes the next input frames of each stream.

    `steps` counts the steps that each stream has done. `total` counts its real input frames so far,
    these included; later frames of this step are zeroed. `capture` lists layers whose outputs are
    returned too. It needs layers without look-ahead, so that all outputs have the same positions.
    """
    if capture and plan.layer_delay:
        raise ValueError("capture: layers with look-ahead have different positions in a stream")
    lengths = jnp.where(total > 0, plan.config.subsampled(total), 0)
    subsampled, inputs = _subsample(encoder, plan, state.inputs, features, steps, total)
    positions = (steps * plan.frames + plan.first)[:, None] + jnp.arange(plan.frames)[None]
    x = encoder.add_positions(subsampled, positions)
    frame_mask = _frame_mask(plan, lengths)
    tied = encoder.tied_biases()

    def body(layer: ConformerLayer, carry: tuple, layer_state: tuple) -> tuple[tuple, tuple]:
        x, positions = carry
        x, layer_state = _advance_layer(
            layer,
            plan,
            x,
            StepInputs(positions=positions, frame_mask=frame_mask, tied_biases=tied),
            layer_state,
        )
        return (x, positions - plan.layer_delay), (layer_state, x if capture else None)

    stacked = tuple(getattr(state, name) for name in EncoderStreamState.STACKED)
    (x, positions), (stacked, outputs) = scan_layers(
        encoder.layers, body, (x, positions), stacked, remat="none"
    )
    state = EncoderStreamState(
        inputs=inputs, **dict(zip(EncoderStreamState.STACKED, stacked, strict=True))
    )
    encoded = StreamFrames(
        frames=encoder.project(x),
        is_real=(positions >= 0) & (positions < lengths[:, None]),
        lengths=lengths,
        captured=encoder.project(jnp.stack([outputs[n] for n in capture], axis=1))
        if capture
        else None,
    )
    return encoded, state


def _frame_mask(plan: EncoderPlan, lengths: Int[Array, " B"]) -> FrameMask:
    """Makes the mask of a step over cached and new keys."""
    left, right = (jnp.full(lengths.shape, side, jnp.int32) for side in plan.context)
    table = None
    if plan.config.is_relative:
        table = distances(
            plan.cache - plan.attention_delay + plan.frames - 1,
            1 - plan.frames - plan.attention_delay,
            plan.config.d_model,
        )
    return FrameMask(positions=table, lengths=lengths, left=left, right=right)


def _advance_layer(
    layer: ConformerLayer,
    plan: EncoderPlan,
    x: Float[Array, "B F D"],
    inputs: StepInputs,
    layer_state: tuple,
) -> tuple[Float[Array, "B F D"], tuple]:
    """Runs one Conformer layer; its output is `plan.layer_delay` positions behind its input."""
    keys, values, attention_queue, gated, conv_queue = layer_state
    x = x + 0.5 * layer.feed_forward_in(layer.feed_forward_in_norm(x))
    delayed, attention_queue = _delay(attention_queue, x)
    mixed, keys, values = _attend(layer, plan, (delayed, x), inputs, (keys, values))
    x = delayed + mixed
    positions = inputs.positions - plan.attention_delay
    is_real = (positions >= 0) & (positions < inputs.frame_mask.lengths[:, None])
    window = jnp.concatenate([gated, layer.conv.gated(layer.conv_norm(x), is_real)], axis=1)
    delayed, conv_queue = _delay(conv_queue, x)
    x = delayed + layer.conv.after_conv(layer.conv.depthwise.valid(window))
    x = x + 0.5 * layer.feed_forward_out(layer.feed_forward_out_norm(x))
    gated = window[:, plan.frames :]
    return layer.output_norm(x), (keys, values, attention_queue, gated, conv_queue)


def _delay(
    delayed: Float[Array, "B W D"], x: Float[Array, "B F D"]
) -> tuple[Float[Array, "B F D"], Float[Array, "B W D"]]:
    """Pushes F frames into a queue and pops the F oldest."""
    queue = jnp.concatenate([delayed, x], axis=1)
    return queue[:, : x.shape[1]], queue[:, x.shape[1] :]


def _attend(
    layer: ConformerLayer,
    plan: EncoderPlan,
    frames: tuple[Float[Array, "B F D"], Float[Array, "B F D"]],
    inputs: StepInputs,
    cache: tuple[Float[Array, "B C N H"], Float[Array, "B C N H"]],
) -> tuple[Float[Array, "B F D"], Float[Array, "B C N H"], Float[Array, "B C N H"]]:
    """Attends from the frames at their turn to cached and new keys; returns the new KV cache.

    `frames` are the query frames (delayed by the look-ahead) and the new frames.
    """
    attention, (query_frames, new) = layer.attention, frames
    normed = layer.attention_norm(new)
    queries = attention.queries(
        layer.attention_norm(query_frames) if plan.attention_delay else normed, inputs.tied_biases
    )
    key, value = (
        jnp.concatenate([old, attention.heads(projection(normed))], axis=1)
        for old, projection in zip(cache, (attention.key, attention.value), strict=True)
    )
    key_positions = (
        inputs.positions[:, :1] - plan.cache + jnp.arange(plan.cache + plan.frames)[None]
    )
    positions = inputs.positions - plan.attention_delay
    weights = attention_weights(
        content_scores(queries[0], key),
        _distance_scores(attention, queries, inputs.frame_mask.positions),
        attention_mask(plan.config.att_context_style, inputs.frame_mask, positions, key_positions),
        attention.scale,
    )
    mixed = attention.output(mix(weights, value).reshape(query_frames.shape))
    return mixed, key[:, plan.frames :], value[:, plan.frames :]


def _distance_scores(
    attention: RelPosSelfAttention,
    queries: tuple[Float[Array, "B F N H"], ...],
    table: Float[Array, "P D"] | None,
) -> Float[Array, "B N F P"] | None:
    """Scores distances. W is applied to the distances or to the queries, whichever is cheaper.

    q . (W p) = (Wᵀ q) . p, and a step has few queries but all the distances of its cache.
    """
    if table is None or attention.position is None:
        return None
    query, table = queries[1], table.astype(queries[1].dtype)
    (_, frames, heads, _), (n_distances, width) = query.shape, table.shape
    if frames * (width + heads * n_distances) > n_distances * (width + frames):
        positions = attention.heads(attention.position(table))
        return jnp.einsum("bfnh,pnh->bnfp", query, positions, preferred_element_type=jnp.float32)
    weight = floats(attention.position.weight[...], query.dtype).reshape(heads, -1, width)
    projected_queries = jnp.einsum("bfnh,nhd->bfnd", query, weight)
    return jnp.einsum("bfnd,pd->bnfp", projected_queries, table, preferred_element_type=jnp.float32)


def _subsample(
    encoder: FastConformer,
    plan: EncoderPlan,
    layer_state: tuple[Float[Array, "B ..."], ...],
    features: Float[Array, "B I M"],
    steps: Int[Array, " B"],
    total: Int[Array, " B"],
) -> tuple[Float[Array, "B F D"], tuple[Float[Array, "B ..."], ...]]:
    """Subsamples the frames of a step; returns the new state of each stage, too."""
    subsampling = encoder.subsampling
    if not plan.stages:
        return subsampling.output(features), ()
    x = _zero_padding(features, steps * plan.input_frames - plan.lead, total)
    if isinstance(subsampling, Stacking):
        window = jnp.concatenate([layer_state[0], x], axis=1)
        return subsampling.project_stacks(window[:, : plan.input_frames]), (
            window[:, plan.input_frames :],
        )
    carried, lengths, x = [], total, x[..., None]
    for stage, state, conv in zip(
        plan.stages, layer_state, _convolutions(subsampling), strict=True
    ):
        window = jnp.concatenate([state, x], axis=1)
        carried.append(window[:, x.shape[1] :])
        lengths = plan.config.halved(lengths)
        x = jax.nn.relu(conv(window, (0, 0)))
        x = _zero_padding(x, steps * x.shape[1] + stage.first, lengths)
    return subsampling.flatten(x), tuple(carried)


def _convolutions(subsampling: Subsampling) -> tuple[HalvingConv | FullStage | SeparableStage, ...]:
    assert subsampling.conv_in is not None
    return (subsampling.conv_in, *subsampling.stages)


def _zero_padding(
    x: Float[Array, "B T *rest"], first: Int[Array, " B"], lengths: Int[Array, " B"]
) -> Float[Array, "B T *rest"]:
    """Zeroes frames before the start or past the end; x starts at position `first`."""
    position = first[:, None] + jnp.arange(x.shape[1])[None]
    is_real = (position >= 0) & (position < lengths[:, None])
    return jnp.where(jnp.expand_dims(is_real, range(2, x.ndim)), x, jnp.zeros((), x.dtype))


def _carry_shapes(plan: EncoderPlan) -> list[tuple[int, ...]]:
    """Returns the shape of each subsampling stage's state for one stream."""
    config, bins = plan.config, plan.config.feat_in
    if config.is_stacking:
        return [(stage.carry, bins) for stage in plan.stages]
    shapes: list[tuple[int, ...]] = []
    for number, stage in enumerate(plan.stages):
        shapes.append((stage.carry, bins, config.conv_channels if number else 1))
        bins = config.halved(bins)
    return shapes
