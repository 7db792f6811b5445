"""Compiled programs of a run: one per batch shape, compiled on first use."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from speechlm2_jax.batches import HostBatch, LossSum
from speechlm2_jax.console import phase
from speechlm2_jax.sharding import put_global
from speechlm2_jax.training.protocol import Variables
from speechlm2_jax.training.state import Layout, TrainState
from speechlm2_jax.training.step import MicroSums, StepFunctions, StepReport

FORWARD_AND_BACKWARD = ("train", "add")
"""Kinds of programs with one compilation per bucket."""


class Programs:
    """The jitted functions of one run. A step donates its state: use the state that it returns."""

    def __init__(
        self,
        functions: StepFunctions,
        layout: Layout,
        compiling: Callable[[], AbstractContextManager[object]] = nullcontext,
        planned: int | None = None,
        complete: Callable[[HostBatch, PyTree, int], HostBatch] | None = None,
    ):
        """`compiling` makes a context manager that is entered around each compilation.

        `planned` is the number of batch shapes, for the message of each compilation. `complete` is
        that of a model with `CompletesBatches`.
        """
        self._functions, self._layout, self._compiling = functions, layout, compiling
        self._planned, self._complete = planned, complete
        self._replicated = functions.sharding.replicated
        self._compiled: dict[Any, Any] = {}
        state = layout.state_shardings
        self._train = jax.jit(
            functions.train, donate_argnums=0, out_shardings=(state, self._replicated)
        )
        self._finish = jax.jit(
            functions.finish, donate_argnums=0, out_shardings=(state, self._replicated)
        )
        self._evaluate = jax.jit(functions.evaluate, out_shardings=self._replicated)
        self._derive = {
            "training": jax.jit(functions.derive_for_training, out_shardings=self._replicated),
            "validation": jax.jit(functions.derive_for_validation, out_shardings=self._replicated),
        }
        self._sums: _SumPrograms | None = None

    @property
    def training_programs(self) -> int:
        """Number of compiled programs with a forward and backward pass; at most one per bucket."""
        return sum(kind in FORWARD_AND_BACKWARD for kind, *_ in self._compiled)

    def put(self, batch: HostBatch) -> Any:
        """Places a batch's arrays on the devices."""
        return self._functions.sharding.put_batch(batch.arrays)

    def train(
        self, state: TrainState, frozen: Variables, batch: HostBatch, lr: float
    ) -> tuple[TrainState, StepReport]:
        """Runs one optimizer step on one batch."""
        batch = self._completed("training", batch, (state, frozen), (self._scalar(np.int32(0)),))
        arrays = self.put(batch)
        arguments = (state, frozen, arrays, self._scalar(np.float32(lr)))
        return self._program("train", batch.bucket, arrays, self._train, arguments)(*arguments)

    def accumulate(
        self,
        sums: MicroSums | None,
        state: TrainState,
        frozen: Variables,
        batch: HostBatch,
        index: int,
    ) -> MicroSums:
        """Adds micro-batch `index` to `sums`, which are donated; None: the first micro-batch."""
        number = self._scalar(np.int32(index))
        batch = self._completed("training", batch, (state, frozen), (number,))
        arrays = self.put(batch)
        if self._sums is None:
            self._sums = _SumPrograms.make(self._functions, self._layout, state, frozen, arrays)
        if sums is None:
            sums = self._program("start", "", (), self._sums.start, (state.buffers,))(state.buffers)
        arguments = (sums, state, frozen, arrays, number)
        return self._program("add", batch.bucket, arrays, self._sums.add, arguments)(*arguments)

    def finish(
        self, state: TrainState, sums: MicroSums, lr: float
    ) -> tuple[TrainState, StepReport]:
        """Runs the optimizer update on accumulated sums."""
        arguments = (state, sums, self._scalar(np.float32(lr)))
        return self._program("update", "", (), self._finish, arguments)(*arguments)

    def evaluate(
        self, state: TrainState, frozen: Variables, batch: HostBatch
    ) -> dict[str, LossSum]:
        """Computes the loss sums of one validation batch, on the device."""
        weights = (state.trainable, state.buffers, frozen)
        arrays = self.put(batch := self._completed("validation", batch, weights))
        arguments = (*weights, arrays)
        program = self._program("validation", batch.bucket, arrays, self._evaluate, arguments)
        return program(*arguments)

    def compile_ahead(self, batch: HostBatch) -> jax.stages.Compiled:
        """Compiles the training program of a batch's shape without running it.

        Returns the result of `jax.jit(...).lower(...).compile()`, which has `memory_analysis`.
        `train` and `accumulate` use it for batches of this shape.
        """
        layout, functions = self._layout, self._functions
        arrays = jax.tree.map(
            lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
            *(batch.arrays, functions.sharding.batch(batch.arrays)),
        )
        state, frozen = layout.state, layout.frozen
        if functions.accumulate == 1:
            rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._replicated)
            kind, function, arguments = "train", self._train, (state, frozen, arrays, rate)
        else:
            sums = _SumPrograms.make(functions, layout, state, frozen, arrays)
            index = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
            arguments = (sums.shapes, state, frozen, arrays, index)
            kind, function = "add", sums.add
        with phase(self._describe(kind, batch.bucket)):
            compiled = self._compile(function.lower(*arguments))
        self._compiled[kind, _shapes(arrays)] = compiled
        return compiled

    def _completed(
        self,
        use: str,
        batch: HostBatch,
        before: tuple[PyTree, ...],
        after: tuple[PyTree, ...] = (),
    ) -> HostBatch:
        """The batch with what the model adds to it; waits for the device if it does."""
        if self._complete is None:
            return batch
        arrays = self.put(batch)
        arguments = (*before, arrays, *after)
        kind = f"{use} transcripts"
        program = self._program(kind, batch.bucket, arrays, self._derive[use], arguments)
        derived = jax.device_get(program(*arguments))
        return self._complete(batch, derived, self._functions.sharding.length_multiple)

    def _scalar(self, value: np.number) -> jax.Array:
        return put_global(value, self._replicated)

    def _program(
        self,
        kind: str,
        bucket: str,
        batch: PyTree,
        function: jax.stages.Wrapped,
        arguments: tuple[PyTree, ...],
    ) -> jax.stages.Compiled:
        """The compiled program for a batch's shapes."""
        shapes = _shapes(batch)
        if (kind, shapes) not in self._compiled:
            with self._compiling(), phase(self._describe(kind, bucket)):
                self._compiled[kind, shapes] = self._compile(function.lower(*arguments))
        return self._compiled[kind, shapes]

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        return lowered.compile(compiler_options=self._functions.sharding.compiler_options)

    def _describe(self, kind: str, bucket: str) -> str:
        """The message of a compilation: "compiling the train program of bucket X (2 of 5)"."""
        name = f"compiling the {kind} program" + (f" of bucket {bucket}" if bucket else "")
        if kind not in FORWARD_AND_BACKWARD or self._planned is None:
            return name
        return f"{name} ({self.training_programs + 1} of {self._planned})"


def _shapes(batch: PyTree) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shape and dtype of each array of a batch."""
    return tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in jax.tree.leaves(batch))


@dataclass(frozen=True, kw_only=True)
class _SumPrograms:
    """The jitted functions of gradient accumulation, made from the shapes of the first batch."""

    start: jax.stages.Wrapped
    add: jax.stages.Wrapped
    shapes: MicroSums
    """Shapes and shardings of the sums."""

    @staticmethod
    def make(
        functions: StepFunctions,
        layout: Layout,
        state: TrainState,
        frozen: Variables,
        batch: PyTree,
    ) -> "_SumPrograms":
        shapes = jax.eval_shape(functions.micro, state, state.buffers, frozen, batch, 0)
        state_shardings = layout.state_shardings
        replicated = jax.tree.map(lambda _: functions.sharding.replicated, shapes)
        shardings = replace(
            replicated, grads=state_shardings.trainable, buffers=state_shardings.buffers
        )
        start = partial(functions.start, shapes)
        return _SumPrograms(
            start=jax.jit(start, out_shardings=shardings),
            add=jax.jit(functions.add, donate_argnums=0, out_shardings=shardings),
            shapes=jax.tree.map(
                lambda leaf, placement: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=placement
                ),
                *(shapes, shardings),
            ),
        )
