"""Validation that the processes of a run share: each reads and scores the groups of its devices.

Where the devices of a process hold whole copies of all weights, it generates from these alone,
without waiting for the others. At the end of a set the processes exchange what they have counted.
Elsewhere all processes generate each text together, and each reads all recordings.
"""

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from speechlm2_jax.batches import HostBatch, LossSum
from speechlm2_jax.processes import gather_texts
from speechlm2_jax.training.protocol import DataSource, Sample, TrainableModel, Variables

Sums = Mapping[str, Sequence[LossSum]]
"""Of each metric that is computed on the host: its sum of each batch."""


def own_copies(variables: Variables, own: Mesh | None) -> Variables:
    """The copies of the arrays on this process's part of their mesh; None: the arrays themselves.

    They share the memory of the arrays.
    """
    if own is None:
        return variables
    return {path: _own_copy(value, own) for path, value in variables.items()}


def _own_copy(value: Any, own: Mesh) -> Any:
    placement = getattr(value, "sharding", None)
    if not isinstance(placement, NamedSharding) or value.is_fully_addressable:
        return value
    parts = [shard.data for shard in value.addressable_shards]
    return jax.make_array_from_single_device_arrays(
        value.shape, NamedSharding(own, placement.spec), parts
    )


@contextmanager
def generating_from_own_copies(model: TrainableModel, own: Mesh | None) -> Generator[None]:
    """Gives the model the arrays of this process's devices, until the context ends."""
    if own is None:
        yield
        return
    before = model.variables
    model.variables = own_copies(before, own)
    try:
        yield
    finally:
        model.variables = before


def validation_sets(data: DataSource, own: Mesh | None) -> Mapping[str, Iterable[HostBatch]]:
    """The validation sets, of which a process with whole copies of the weights reads its groups."""
    return data.validation_batches() if own is None else data.validation_batches(own_only=True)


def joined(sums: Sums, samples: Sequence[Sample]) -> tuple[dict[str, list[LossSum]], list[Sample]]:
    """The sums and hypotheses of all processes, which all must call it, each with its own.

    The sums of a batch are added in the order of the processes.
    """
    own = {
        "sums": {m: [[float(s.total), float(s.count)] for s in of] for m, of in sums.items()},
        "samples": [[s.id, s.reference, s.hypothesis] for s in samples],
    }
    found = [json.loads(text) for text in gather_texts(json.dumps(own))]
    batches = {m: zip(*(one["sums"][m] for one in found), strict=True) for m in sums}
    return (
        {m: [_added(parts) for parts in of] for m, of in batches.items()},
        [
            Sample(id=id, reference=reference, hypothesis=hypothesis)
            for one in found
            for id, reference, hypothesis in one["samples"]
        ],
    )


def _added(parts: Sequence[Sequence[float]]) -> LossSum:
    totals, counts = zip(*parts, strict=True)
    return LossSum(total=math.fsum(totals), count=math.fsum(counts))
