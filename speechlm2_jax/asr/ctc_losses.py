"""CTC training loss on conversations of one recording and its transcript."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from speechlm2_jax.asr.ctc import CtcNetwork, clip_indices, ctc_loss, pack_labels
from speechlm2_jax.batches import LossSum, SalmBatch, StepLosses
from speechlm2_jax.perception.perception import PerceptionModes


def losses(
    network: CtcNetwork, batch: SalmBatch[Array], *, train: bool, key: Key[Array, ""] | None = None
) -> StepLosses:
    """CTC loss over conversations; the labels are the tokens that an LLM would be trained on.

    Each conversation has one recording; text outside the transcript is not used. `loss` is the mean
    over utterances (NeMo's `mean_batch`), `per_token` the mean over labels.
    """
    groups, clips, samples = batch.audio.shape
    dtype = jnp.dtype(network.ctc.compute_dtype)
    rngs = None
    if key is not None:
        rngs = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.clip_ids.reshape(-1))
    output = network(
        batch.audio.reshape(groups * clips, samples),
        batch.audio_lengths.reshape(-1),
        modes=PerceptionModes(log_mel=train, spec_augment=train, encoder=train, adapter=train),
        rngs=rngs if train else None,
        dtype=dtype,
        remat=network.ctc.remat,
    )
    logits = network.logits(output.frames)
    logits = logits.reshape(groups, clips, *logits.shape[1:])
    clip = jax.vmap(lambda index: clip_indices(index, logits.shape[2]))(batch.audio_index)
    has_clip, clip = clip >= 0, jnp.maximum(clip, 0)
    take_clip = jax.vmap(lambda values, index: jnp.take(values, index, axis=0))
    labels, label_lengths = jax.vmap(pack_labels)(batch.targets, batch.loss_mask)
    label_lengths = jnp.where(has_clip, label_lengths, 0)
    n_sequences = groups * batch.targets.shape[1]
    totals, counts = ctc_loss(
        take_clip(logits, clip).reshape(n_sequences, *logits.shape[2:]),
        take_clip(output.lengths.reshape(groups, clips), clip).reshape(n_sequences),
        labels.reshape(n_sequences, -1),
        label_lengths.reshape(n_sequences),
    )
    tokens = jnp.sum(label_lengths.reshape(n_sequences) * counts)
    return StepLosses(
        loss=LossSum(total=jnp.sum(totals), count=jnp.sum(counts)),
        metrics={"per_token": LossSum(total=jnp.sum(totals), count=tokens)},
        buffers=output.statistics,
    )
