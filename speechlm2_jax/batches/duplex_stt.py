"""Batches of a duplex speech-to-text model: user audio, both text channels and system prompts.

Letters beside those of the package: `P` tokens of a system prompt; `T` frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np

from speechlm2_jax.batches.duplex import DuplexExample, DuplexShape, assemble_duplex_batch
from speechlm2_jax.batches.shared import A, TimeOrder
from speechlm2_jax.pytrees import register_pytree

B = TypeVar("B")


@register_pytree
@dataclass(frozen=True, kw_only=True)
class DuplexSttBatch(Generic[A]):
    """One global batch; fields as in `DuplexBatch`, without the agent's audio."""

    source_audio: A
    """Float32 [G, R, S]."""
    source_lengths: A
    """Int32 [G, R]: samples; 0 for padding (no conversation)."""
    source_extent: A
    """Int32 [G]."""
    target_tokens: A
    """Int32 [G, R, T]."""
    source_tokens: A
    """Int32 [G, R, T]."""
    token_lengths: A
    """Int32 [G, R]."""
    token_extent: A
    """Int32 [G]."""
    prompt_tokens: A
    """Int32 [G, R, P]: the system prompt that precedes the first frame, with bos and eos."""
    prompt_lengths: A
    """Int32 [G, R]."""
    prompt_extent: A
    """Int32 [G]: tokens of the group's longest system prompt (`nemo_exact`)."""
    is_asr: A
    """Bool [G, R]: the conversation is ASR data, whose agent is not scored after its first bos."""
    sequence_ids: A
    """Int32 [G, R]."""

    def map(self, fn: Callable[[A], B]) -> "DuplexSttBatch[B]":
        """Applies `fn` to every array."""
        return DuplexSttBatch(**{f.name: fn(getattr(self, f.name)) for f in fields(self)})

    def in_time_order(self, time_order: TimeOrder) -> "DuplexSttBatch[A]":
        """Returns the batch as it is: the network aligns and reorders the channels."""
        return self


def assemble_duplex_stt_batch(
    groups: Sequence[Sequence[DuplexExample | None]], shape: DuplexShape, *, pad_id: int
) -> DuplexSttBatch[np.ndarray]:
    """Assembles a batch of one static shape as `assemble_duplex_batch` does, with prompts.

    The agent's audio is left out. Raises ValueError if a conversation does not fit.
    """
    base = assemble_duplex_batch(groups, shape, pad_id=pad_id)
    prompts = np.full((*base.token_lengths.shape, shape.prompt_tokens), pad_id, np.int32)
    lengths = np.zeros_like(base.token_lengths)
    is_asr = np.zeros(lengths.shape, bool)
    for g, group in enumerate(groups):
        for r, example in enumerate(group):
            if example is None:
                continue
            tokens = len(example.prompt_tokens)
            if tokens > shape.prompt_tokens:
                raise ValueError(f"{example.id!r}: a prompt of {tokens} tokens exceeds {shape}")
            prompts[g, r, :tokens] = example.prompt_tokens
            lengths[g, r], is_asr[g, r] = tokens, example.is_asr
    return DuplexSttBatch(
        source_audio=base.source_audio,
        source_lengths=base.source_lengths,
        source_extent=base.source_extent,
        target_tokens=base.target_tokens,
        source_tokens=base.source_tokens,
        token_lengths=base.token_lengths,
        token_extent=base.token_extent,
        prompt_tokens=prompts,
        prompt_lengths=lengths,
        prompt_extent=lengths.max(axis=1, initial=0),
        is_asr=is_asr,
        sequence_ids=base.sequence_ids,
    )


def full_duplex_stt_batch(
    shape: DuplexShape, groups: int, *, pad_id: int = 0
) -> DuplexSttBatch[np.ndarray]:
    """Makes a batch of silence and pad ids without padding, as `full_duplex_batch` does."""
    channel = np.full(shape.tokens, pad_id, np.int32)
    example = DuplexExample(
        id="full",
        source_audio=np.zeros(shape.source_samples, np.float32),
        target_audio=np.zeros(0, np.float32),
        target_tokens=channel,
        source_tokens=channel,
        prompt_tokens=np.full(shape.prompt_tokens, pad_id, np.int32),
    )
    one = assemble_duplex_stt_batch([[example] * shape.sequences], shape, pad_id=pad_id)
    return one.map(lambda x: np.broadcast_to(x, (groups, *x.shape[1:])))
