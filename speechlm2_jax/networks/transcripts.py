"""The transcript that the ASR model of a SALMWithAsrDecoder writes of each clip."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from speechlm2_jax.asr.greedy import DecodingLimits, decode_greedily
from speechlm2_jax.asr.transducer import TransducerNetwork
from speechlm2_jax.batches import SalmBatch
from speechlm2_jax.networks.salm import Salm, SalmModes, example_rngs, split_rng
from speechlm2_jax.pytrees import register_pytree

A = TypeVar("A")
_DROP_RNG = 4
"""Folded into the key of a clip; perception's components have 0 to 3."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Transcripts(Generic[A]):
    """Labels of each clip of a batch. Arrays are JAX on the devices, NumPy on the host."""

    labels: A
    """Int32 [G, C, U]; only the first `lengths` of a clip are valid."""
    lengths: A
    """Int32 [G, C]."""


def transcribe(
    network: Salm,
    batch: SalmBatch[Array],
    modes: SalmModes,
    rng: Key[Array, ""] | None,
    limits: DecodingLimits,
    drop_probability: float = 0.0,
) -> Transcripts[Array]:
    """Transcribes every clip greedily, from the encoder output that the loss reads too.

    So masks and dropout of training are the same, given the same `rng`, of which a transcript is
    also left empty with `drop_probability`. `limits` are keyword arguments of `decode_greedily`.
    Nothing has a gradient.
    """
    groups, clips, samples = batch.audio.shape
    if clips == 0:
        empty = jnp.zeros((groups, 0, 0), jnp.int32)
        return Transcripts(labels=empty, lengths=empty[:, :, 0])
    perception = network.perception
    assert isinstance(perception, TransducerNetwork)
    rngs = example_rngs(split_rng(rng)[0], batch.clip_ids)
    encoded = perception.encoder_output(
        batch.audio.reshape(groups * clips, samples),
        batch.audio_lengths.reshape(-1),
        modes=modes.perception,
        rngs=rngs,
        extents=jnp.repeat(batch.audio_extent, clips),
        dtype=network.dtype,
    )
    found = decode_greedily(perception, encoded.frames, encoded.lengths, **limits)
    lengths = jnp.where(_dropped(rngs, found.lengths, drop_probability), 0, found.lengths)
    return Transcripts(
        labels=found.labels.reshape(groups, clips, -1), lengths=lengths.reshape(groups, clips)
    )


def _dropped(
    rngs: Key[Array, " B"] | None, lengths: Int[Array, " B"], probability: float
) -> Bool[Array, " B"]:
    if rngs is None or probability == 0:
        return jnp.zeros(lengths.shape, bool)
    draws = jax.vmap(lambda rng: jax.random.uniform(jax.random.fold_in(rng, _DROP_RNG)))(rngs)
    return draws < probability
