"""The likelihood of given responses: teacher forcing, with the loss of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from speechlm2_jax import sharding
from speechlm2_jax.batches import LossSum, SalmBatch, SalmExample, assemble_salm_batch
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.groups import split_evenly
from speechlm2_jax.inference.padding import prompt_shape
from speechlm2_jax.inference.transcripts import with_transcripts
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.losses import cross_entropy_by_sequence
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.sharding import Sharding


@dataclass(frozen=True, kw_only=True)
class ResponseLoss:
    """The loss of the responses of one conversation."""

    nll: float
    """Sum of the negative log-likelihoods of its tokens, in nats."""
    tokens: int


def response_losses(engine: Engine, examples: Sequence[SalmExample]) -> list[ResponseLoss]:
    """The loss of each example on the tokens of its `loss_mask`, as in validation.

    Each token is predicted from all tokens and frames before it. The activations have the model's
    dtype; log-softmax and sums are fp32. Compiles one program per shape; sizes are rounded up.
    """
    examples, placement = with_transcripts(engine, examples), engine.placement
    groups = split_evenly(examples, 1 if placement is None else placement.data_parallel_size)
    batch = assemble_salm_batch(
        groups,
        prompt_shape(groups, engine.frame_count),
        frame_count=engine.frame_count,
        placeholder_id=engine.audio_locator_tag_id,
    )
    if engine.nemo_exact:
        batch = batch.without_id(engine.text_pad_id)
    arrays = batch if placement is None else placement.put_batch(batch)
    found: LossSum[np.ndarray] = jax.device_get(_losses(*engine.network, arrays, placement))
    rows = batch.tokens.shape[1]
    places = [g * rows + r for g, group in enumerate(groups) for r in range(len(group))]
    return [ResponseLoss(nll=float(found.total[i]), tokens=int(found.count[i])) for i in places]


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def _losses(
    graphdef: nnx.GraphDef[Salm],
    variables: Variables,
    batch: SalmBatch[Array],
    placement: Sharding | None,
) -> LossSum:
    """Sums and counts [B], on every device."""
    network: Salm = merge(graphdef, variables)
    with sharding.use(placement):
        inputs = salm_network.prepare(network, batch, SalmModes())
        hidden = salm_network.forward(network, inputs.embeds, batch, SalmModes())
        shape = hidden.shape[:2]
        found = cross_entropy_by_sequence(
            hidden,
            batch.targets.reshape(shape),
            batch.loss_mask.reshape(shape),
            network.llm.logits,
            sequences_per_shard=batch.tokens.shape[1],
        )
        return sharding.on_every_device(found)
