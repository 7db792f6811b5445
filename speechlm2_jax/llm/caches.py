"""The empty KV caches of a decoder."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from speechlm2_jax.layers.attention import SLOTS, Case, implementation
from speechlm2_jax.layers.cache import KVCache, RingCache
from speechlm2_jax.layers.paged_cache import PagedCache
from speechlm2_jax.layers.rope import DynamicScaling, LongRopeScaling
from speechlm2_jax.layers.sink_cache import SinkCache
from speechlm2_jax.layers.window_cache import WindowCache
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.sharding import key_value_copies, platform, tensor_size

TILE_ROWS = 8
"""Positions in a tile of a cache [L, B, N_kv, S, H] on a TPU."""


def new_cache(
    config: DecoderConfig, room: tuple[int, int], dtype: DTypeLike, kind: str | None
) -> KVCache:
    """Makes an empty KV cache; `room` is (sequences, positions), `kind` as for `KVCache`."""
    return KVCache.empty(
        _shape(config, room, None),
        dtype,
        windows=_windows(config, room, dtype, kind),
        keeps_token_positions=any(layer.chunk for layer in config.pattern),
        kind=kind,
    )


def sink_cache(
    config: DecoderConfig, room: tuple[int, int], dtype: DTypeLike, kind: str | None, sinks: int
) -> SinkCache:
    """Makes an empty cache for sequences without end; `room` includes the sinks.

    Raises ValueError for a decoder whose attention depends on more than distances.
    """
    problem = endless_problem(config)
    if problem:
        raise ValueError(problem)
    return SinkCache.around(new_cache(config, room, dtype, kind), sinks, has_positions=True)


def endless_problem(config: DecoderConfig) -> str | None:
    """Why sequences of this decoder cannot go on without end; None if they can."""
    if any(layer.chunk for layer in config.pattern):
        return "layers with chunked attention start anew at each chunk"
    if config.query_growth:
        return "the scale of queries grows with the position"
    ropes = [rope for kind in config.pattern if (rope := config.rope_of(kind)) is not None]
    for rope in ropes:
        if isinstance(rope.scaling, DynamicScaling | LongRopeScaling):
            name = type(rope.scaling).__name__.removesuffix("Scaling")
            return f"its rotary scaling ({name}) depends on the length of the sequence"
    return None


def slot_cache(
    config: DecoderConfig, room: tuple[int, int, int], dtype: DTypeLike, kind: str | None
) -> RingCache | PagedCache:
    """Makes an empty cache for continuous batching, of pages where `implementation` reads those.

    `room` is (slots, tokens of a prompt, new tokens). A quantized cache has a scale for each key,
    which no kernel reads.
    """
    slots, prompt_tokens, new_tokens = room
    whole = (slots, prompt_tokens + new_tokens)
    is_plain = kind is None and config.count(None) > 0
    if is_plain and implementation(_case(config, jnp.dtype(dtype))) == "ragged":
        windows = _windows(config, whole, dtype, kind)
        return PagedCache.empty(_shape(config, whole, None), dtype, prompt_tokens, windows)
    # whole tiles of a TPU: XLA else keeps the array in another layout than the loop reads
    rows = (slots, whole[1] + -whole[1] % TILE_ROWS)
    return RingCache.around(new_cache(config, rows, dtype, kind), prompt_tokens)


def _case(config: DecoderConfig, dtype: jnp.dtype) -> Case:
    heads, devices = _heads(config), tensor_size()
    return Case(
        platform=platform(),
        kind=SLOTS,
        tokens=1,
        head_width=config.head_width,
        dtype=dtype,
        is_capped=config.attention_softcap is not None,
        is_chunked=any(layer.chunk for layer in config.pattern),
        divides=heads % devices == 0,
        kv_heads=heads // devices,
    )


def _heads(config: DecoderConfig) -> int:
    return config.kv_heads * key_value_copies(config.kv_heads, config.heads)


def _shape(
    config: DecoderConfig, room: tuple[int, int], window: int | None
) -> tuple[int, int, int, int, int]:
    return config.count(window), *room, _heads(config), config.head_width


def _windows(
    config: DecoderConfig, room: tuple[int, int], dtype: DTypeLike, kind: str | None
) -> tuple[WindowCache, ...]:
    return tuple(
        WindowCache.empty(_shape(config, room, window), window, dtype, kind)
        for window in config.windows
    )
