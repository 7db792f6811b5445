"""Generation equals greedy decoding by full forward passes, for any padding and batch."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.generation.processors import Keep, Temperature, TopK
from speechlm2_jax.generation.salm import (
    BeamConfig,
    DecodingConfig,
    GenerationOutput,
    Prompts,
    decode,
    generate_tokens,
    prefill,
    read_outputs,
)
from speechlm2_jax.generation.warpers import keep_top_p
from speechlm2_jax.layers.cache import KVCache
from speechlm2_jax.layers.decoding_cache import CachedOutput
from speechlm2_jax.layers.module import Variables, merge, split
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder

CONFIG = DecoderConfig(
    vocab_size=31,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    init_std=0.4,
)
GRAPHDEF, VARIABLES = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
PAD = 0
GREEDY = DecodingConfig(max_new_tokens=6, stop_ids=(), pad_id=PAD)
PROMPTS = [[3, 7, 11, 5, 2], [9, 4], [8, 8, 1, 30]]


@partial(jax.jit, static_argnames="config")
def generate(
    variables: Variables,
    embeds: jax.Array,
    lengths: jax.Array,
    attention_mask: jax.Array,
    config: DecodingConfig,
    rngs: jax.Array | None = None,
) -> jax.Array:
    decoder: Decoder = merge(GRAPHDEF, variables)
    return generate_tokens(
        decoder, embeds, lengths=lengths, attention_mask=attention_mask, config=config, rngs=rngs
    )


def padded_prompts(prompts: list[list[int]], length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings with garbage after each prompt, lengths, and attention masks."""
    ids = np.full((len(prompts), length), 13)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    decoder: Decoder = merge(GRAPHDEF, VARIABLES)
    attention_mask = np.arange(length)[None] < lengths[:, None]
    return decoder.embed(jnp.asarray(ids)), jnp.asarray(lengths), jnp.asarray(attention_mask)


@jax.jit
def scores_of_last(ids: jax.Array, attention_mask: jax.Array, length: jax.Array) -> jax.Array:
    decoder: Decoder = merge(GRAPHDEF, VARIABLES)
    hidden = decoder(
        decoder.embed(ids[None]),
        positions=jnp.maximum(jnp.cumsum(attention_mask, dtype=jnp.int32) - 1, 0)[None],
        segments=jnp.ones((1, len(ids)), jnp.int32),
        attention_mask=attention_mask[None],
    )
    return decoder.logits(hidden)[0, length - 1]


def by_full_passes(prompt: list[int], holes: tuple[int, ...] = ()) -> list[int]:
    """Greedy decoding without a cache: the whole sequence runs again for every token."""
    capacity, ids = 12, list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        row = jnp.asarray(ids + [13] * (capacity - len(ids)))
        attention_mask = (np.arange(capacity) < len(ids)) & ~np.isin(np.arange(capacity), holes)
        ids.append(int(jnp.argmax(scores_of_last(row, jnp.asarray(attention_mask), len(ids)))))
    return ids[len(prompt) :]


def test_generation_equals_full_passes_for_any_padding_and_batch() -> None:
    together = generate(VARIABLES, *padded_prompts(PROMPTS, 6), GREEDY)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(VARIABLES, *padded_prompts([prompt], 5), GREEDY)[0]
        assert together[row].tolist() == alone.tolist() == by_full_passes(prompt)


def test_masked_positions_are_skipped_by_attention_and_position_ids() -> None:
    embeds, lengths, attention_mask = padded_prompts([PROMPTS[0]], 6)
    ids = generate(VARIABLES, embeds, lengths, attention_mask.at[0, 2].set(False), GREEDY)[0]
    assert ids.tolist() == by_full_passes(PROMPTS[0], holes=(2,))
    assert ids.tolist() != by_full_passes(PROMPTS[0])


def test_a_response_ends_with_its_stop_token_and_is_padded() -> None:
    free = generate(VARIABLES, *padded_prompts(PROMPTS, 6), GREEDY)
    stops = (int(free[0, 2]), int(free[1, 0]))
    config = DecodingConfig(max_new_tokens=6, stop_ids=stops, pad_id=PAD)
    stopped = generate(VARIABLES, *padded_prompts(PROMPTS, 6), config)
    for expected, row in zip(free.tolist(), stopped.tolist(), strict=True):
        end = next((i for i, token in enumerate(expected) if token in stops), 5)
        assert row == expected[: end + 1] + [PAD] * (5 - end)


def test_logprobs_are_those_of_full_passes_before_processors() -> None:
    """Of sampled tokens at another temperature; 0 after the end, and the tokens are the same."""
    free = generate(VARIABLES, *padded_prompts(PROMPTS, 6), GREEDY)
    config = replace(
        GREEDY,
        do_sample=True,
        processors=(Temperature(1.7),),
        stop_ids=(int(free[0, 2]), 4),
        keeps_logprobs=True,
    )
    rngs = jax.random.split(jax.random.key(3), len(PROMPTS))

    @jax.jit
    def run(embeds: jax.Array, lengths: jax.Array, mask: jax.Array) -> GenerationOutput:
        decoder: Decoder = merge(GRAPHDEF, VARIABLES)
        prompts = Prompts(embeds, lengths, mask, rngs=rngs)
        return read_outputs(decode(decoder, prefill(decoder, prompts, config), config, 6), config)

    found = run(*padded_prompts(PROMPTS, 6))
    without = replace(config, keeps_logprobs=False)
    same = generate(VARIABLES, *padded_prompts(PROMPTS, 6), without, rngs)
    assert found.ids.tolist() == same.tolist() and found.logprobs is not None
    for row, prompt in enumerate(PROMPTS):
        length = int(found.lengths[row])
        ids = [*prompt, *found.ids[row, :length].tolist()]
        padded = jnp.asarray(ids + [13] * (12 - len(ids)))
        for n in range(length):
            count = len(prompt) + n
            scores = scores_of_last(padded, jnp.arange(12) < count, jnp.asarray(count))
            expected = jax.nn.log_softmax(scores)[ids[count]]
            np.testing.assert_allclose(found.logprobs[row, n], expected, atol=1e-4)
        assert not found.logprobs[row, length:].any()


def test_logprobs_are_not_kept_with_beams() -> None:
    with pytest.raises(ValueError, match="token_logprobs is not supported"):
        replace(GREEDY, keeps_logprobs=True, beams=BeamConfig(count=2))


def test_one_program_serves_all_prompts_of_a_shape() -> None:
    count = generate._cache_size
    generate(VARIABLES, *padded_prompts(PROMPTS[:2], 6), GREEDY)
    before = count()
    generate(VARIABLES, *padded_prompts(PROMPTS[1:], 6), GREEDY)
    assert count() == before


def test_the_loop_updates_the_cache_in_place() -> None:
    prompts = padded_prompts(PROMPTS, 6)
    text = generate.lower(VARIABLES, *prompts, GREEDY).compile().as_text()
    loops = text[: text.index("ENTRY")]
    capacity = 6 + GREEDY.max_new_tokens - 1
    cache = rf"f32\[{CONFIG.layers},{len(PROMPTS)},1,{capacity},{CONFIG.head_width}\]\S*"
    assert re.search(rf"{cache} dynamic-update-slice\(", loops)
    assert not re.search(rf"{cache} copy\(", loops)


def test_an_empty_prompt_gives_padding_only() -> None:
    assert not np.asarray(generate(VARIABLES, *padded_prompts([PROMPTS[0], []], 6), GREEDY))[
        1
    ].any()


def test_a_sampled_response_depends_on_its_own_prompt_and_key_only() -> None:
    config = replace(
        GREEDY, do_sample=True, processors=(Temperature(1.5), TopK(20), Keep(keep_top_p, 0.95))
    )
    rngs = jax.random.split(jax.random.key(3), 4)
    prompts = [*PROMPTS, PROMPTS[0]]
    together = generate(VARIABLES, *padded_prompts(prompts, 6), config, rngs).tolist()
    alone = generate(VARIABLES, *padded_prompts(prompts[1:2], 5), config, rngs[1:2]).tolist()
    assert alone == together[1:2]
    assert together[0] != together[3]


class CountingDecoder:
    """Predicts the length of its input as the next token and records every call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def embed(self, ids: jax.Array) -> jax.Array:
        return jnp.zeros((*ids.shape, 1))

    def new_cache(self, batch: int, capacity: int, dtype: Any) -> KVCache:
        return KVCache.empty((1, batch, capacity, 1, 2), dtype)

    def extend(
        self,
        embeds: jax.Array,
        cache: KVCache,
        *,
        positions: jax.Array,
        attention_mask: jax.Array,
        is_first: bool = False,
        unpacked: bool = False,
    ) -> CachedOutput:
        jax.debug.callback(self.calls.append, positions)
        cache = cache.reserve(attention_mask).advance(embeds.shape[1])
        return CachedOutput(positions[..., None].astype(jnp.float32), cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return jax.nn.one_hot(hidden[..., 0].astype(jnp.int32) + 1, 20)


def test_the_loop_stops_when_all_have_ended_and_positions_continue_from_each_length() -> None:
    decoder = CountingDecoder()
    config = DecodingConfig(max_new_tokens=10, stop_ids=(5,), pad_id=0)
    ids = generate_tokens(
        decoder,
        jnp.zeros((2, 4, 1)),
        lengths=jnp.asarray([4, 2]),
        attention_mask=jnp.ones((2, 4), bool),
        config=config,
    )
    jax.effects_barrier()
    assert ids.tolist() == [[4, 5] + [0] * 8, [2, 3, 4, 5] + [0] * 6]
    assert [np.asarray(p).tolist() for p in decoder.calls] == [
        [[0, 1, 2, 3], [0, 1, 0, 0]],
        [[4], [2]],
        [[5], [3]],
        [[6], [4]],
    ]


def test_no_new_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        DecodingConfig(max_new_tokens=0, stop_ids=(), pad_id=0)
