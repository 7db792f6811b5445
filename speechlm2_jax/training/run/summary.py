"""Summary of a run for --dry-run: parameters by module, batch shapes, steps, memory."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from speechlm2_jax.batches import HostBatch
from speechlm2_jax.training.intervals import Intervals
from speechlm2_jax.training.protocol import DataSource, ModelOutline, VariableSpec
from speechlm2_jax.training.run.preparation import Setup

LORA = ("lora_a", "lora_b")
"""Last components of the paths of LoRA's factors."""
DEPTH = 2
"""The table has one line per module, named by the first two components of the path."""


@dataclass(frozen=True, kw_only=True)
class ModuleSize:
    """The parameter counts of one module."""

    name: str
    trained: int
    frozen: int

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self.trained + self.frozen


def module_sizes(
    infos: Mapping[str, VariableSpec], trainable: Mapping[str, bool | np.ndarray]
) -> list[ModuleSize]:
    """Counts the parameters of every module, in the model's order; buffers are not counted.

    If only some layers of a stack are trained, their parameters count as trained.
    """
    counts: dict[str, list[int]] = {}
    for path, info in infos.items():
        if info.is_buffer:
            continue
        count = math.prod(info.shape)
        trained = round(count * float(np.mean(trainable[path])))
        sizes = counts.setdefault(_module(path), [0, 0])
        sizes[0] += trained
        sizes[1] += count - trained
    return [ModuleSize(name=name, trained=t, frozen=f) for name, (t, f) in counts.items()]


def describe_run(
    model: ModelOutline, datamodule: DataSource, setup: Setup, intervals: Intervals
) -> Iterator[str]:
    """Yields blocks of lines. The last one takes long: it compiles the largest training program."""
    yield modules_table(module_sizes(model.infos, model.trainable))
    yield setup.describe(setup.sharding.data_parallel_size)
    yield _steps(datamodule, intervals)
    name, make = max(datamodule.training_shapes().items(), key=lambda item: _bytes(item[1]()))
    batch = make()
    program = setup.programs(model).compile_ahead(batch)
    yield memory_table(setup, name, batch, program.memory_analysis())


def modules_table(sizes: list[ModuleSize]) -> str:
    """One line per module, and a line with the sums."""
    total = ModuleSize(
        name="total", trained=sum(s.trained for s in sizes), frozen=sum(s.frozen for s in sizes)
    )
    width = max(len(s.name) for s in sizes)
    header = f"{'module':<{width}}  {'trained':>15}  {'frozen':>15}  {'parameters':>15}"
    lines = [
        f"{s.name:<{width}}  {s.trained:>15,}  {s.frozen:>15,}  {s.total:>15,}"
        for s in (*sizes, total)
    ]
    return "\n".join([header, *lines])


def memory_table(setup: Setup, bucket: str, batch: HostBatch, analysis: Any) -> str:
    """Memory of one device during a step on the largest shape.

    `analysis` is the compiler's memory analysis. Without it the table has no line for activations.
    """
    state = setup.layout.state
    gradients = device_bytes(state.trainable)
    rows = {
        "trained parameters": gradients,
        "frozen parameters and buffers": device_bytes((setup.layout.frozen, state.buffers)),
        "optimizer state": device_bytes(state.opt_state),
        "batch": device_bytes(
            jax.tree.map(
                lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
                *(batch.arrays, setup.sharding.batch(batch.arrays)),
            )
        ),
        "gradients": gradients,
    }
    working = getattr(analysis, "temp_size_in_bytes", 0)
    if working:
        rows["activations and other scratch"] = max(working - gradients, 0)
    rows["total"] = sum(rows.values())
    where = f"each of {len(setup.devices)} x {setup.devices[0].device_kind}"
    lines = [f"memory of {where}, at a step of bucket {bucket}"]
    lines += [f"  {name:<40}  {_mebibytes(size):>10}" for name, size in rows.items()]
    if not working:
        lines.append("  (this device's compiler does not report the memory of activations)")
    return "\n".join(lines)


def device_bytes(tree: PyTree) -> int:
    """Bytes that one device holds of all arrays in `tree`."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _steps(datamodule: DataSource, intervals: Intervals) -> str:
    batches = datamodule.batches_per_pass()
    about = "about " if getattr(datamodule, "is_estimated", False) else ""
    lines = [f"one pass over the training data: {about}{batches} batches"]
    if intervals.epoch_batches is not None:
        lines.append(
            f"an epoch (trainer.limit_train_batches): {intervals.epoch_batches} batches, "
            f"{intervals.epoch_steps} steps"
        )
    else:
        lines.append(f"steps of one pass: {-(-batches // intervals.accumulate)}")
    if (last := intervals.last_step) is not None:
        passes = last * intervals.accumulate / max(batches, 1)
        lines.append(f"the run: {last} steps, about {passes:.1f} passes")
    return "\n".join(lines)


def _module(path: str) -> str:
    *modules, name = path.split(".")
    named = ".".join(modules[:DEPTH])
    return f"{named} (LoRA)" if name in LORA else named


def _bytes(batch: HostBatch) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(batch.arrays))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
