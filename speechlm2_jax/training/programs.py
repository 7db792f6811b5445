"""Compiled programs of a run: one per static shape, compiled on first use and kept."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from speechlm2_jax.batches import HostBatch, LossSum
from speechlm2_jax.training.protocol import Variables
from speechlm2_jax.training.state import Layout, TrainState
from speechlm2_jax.training.step import MicroSums, StepFunctions, StepReport

log = logging.getLogger(__name__)

SLOW_COMPILE_S = 2.0
"""A compilation that takes longer is announced, so that the run does not look hung."""


class Programs:
    """The jitted functions of one run. A state given to a step is donated: use what it returns."""

    def __init__(
        self,
        functions: StepFunctions,
        layout: Layout,
        compiling: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        """`compiling` is entered around each compilation, to measure it."""
        self._functions, self._layout, self._compiling = functions, layout, compiling
        self._whole = functions.sharding.replicated
        self._compiled: dict[Any, Any] = {}
        state = layout.state_shardings
        self._train = jax.jit(functions.train, donate_argnums=0, out_shardings=(state, self._whole))
        self._finish = jax.jit(
            functions.finish, donate_argnums=0, out_shardings=(state, self._whole)
        )
        self._evaluate = jax.jit(functions.evaluate, out_shardings=self._whole)
        self._sums: _SumPrograms | None = None

    @property
    def training_programs(self) -> int:
        """How many programs hold a forward and backward pass; at most one per bucket."""
        return sum(kind in ("train", "add") for kind, *_ in self._compiled)

    def put(self, batch: HostBatch) -> Any:
        """Places a batch's arrays on the devices."""
        return self._functions.sharding.put_batch(batch.arrays)

    def train(
        self, state: TrainState, frozen: Variables, batch: HostBatch, lr: float
    ) -> tuple[TrainState, StepReport]:
        """One optimizer step on one batch."""
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
        """Adds micro-batch `index`; `sums` (None at the first) is donated, the state is not."""
        arrays = self.put(batch)
        if self._sums is None:
            self._sums = _SumPrograms.make(self._functions, self._layout, state, frozen, arrays)
        if sums is None:
            sums = self._program("start", "", (), self._sums.start, (state.buffers,))(state.buffers)
        arguments = (sums, state, frozen, arrays, self._scalar(np.int32(index)))
        return self._program("add", batch.bucket, arrays, self._sums.add, arguments)(*arguments)

    def finish(
        self, state: TrainState, sums: MicroSums, lr: float
    ) -> tuple[TrainState, StepReport]:
        """The update from accumulated sums."""
        arguments = (state, sums, self._scalar(np.float32(lr)))
        return self._program("update", "", (), self._finish, arguments)(*arguments)

    def evaluate(
        self, state: TrainState, frozen: Variables, batch: HostBatch
    ) -> dict[str, LossSum]:
        """Sums of one validation batch, still on the device."""
        arrays = self.put(batch)
        arguments = (state.trainable, state.buffers, frozen, arrays)
        program = self._program("validation", batch.bucket, arrays, self._evaluate, arguments)
        return program(*arguments)

    def _scalar(self, value: Any) -> jax.Array:
        return jax.device_put(value, self._whole)

    def _program(
        self, kind: str, bucket: str, batch: Any, function: Any, arguments: tuple[Any, ...]
    ) -> Any:
        """The compiled program for a batch's shapes."""
        shapes = tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in jax.tree.leaves(batch))
        if (kind, shapes) not in self._compiled:
            name = f"{kind} program" + (f" of bucket {bucket}" if bucket else "")
            with self._compiling(), announce(name):
                self._compiled[kind, shapes] = function.lower(*arguments).compile()
        return self._compiled[kind, shapes]


@dataclass(frozen=True, kw_only=True)
class _SumPrograms:
    """What accumulation needs, jitted; the sums' shapes are known once a batch is there."""

    start: Any
    add: Any

    @staticmethod
    def make(
        functions: StepFunctions, layout: Layout, state: TrainState, frozen: Variables, batch: Any
    ) -> "_SumPrograms":
        shapes = jax.eval_shape(functions.micro, state, state.buffers, frozen, batch, 0)
        placements = layout.state_shardings
        whole = jax.tree.map(lambda _: functions.sharding.replicated, shapes)
        where = replace(whole, grads=placements.trainable, buffers=placements.buffers)
        start = partial(functions.start, shapes)
        return _SumPrograms(
            start=jax.jit(start, out_shardings=where),
            add=jax.jit(functions.add, donate_argnums=0, out_shardings=where),
        )


@contextmanager
def announce(name: str) -> Iterator[None]:
    """Logs a slow compilation: once when it has taken long, once with its time."""
    begin = time.monotonic()
    timer = threading.Timer(SLOW_COMPILE_S, lambda: log.info("compiling the %s ...", name))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    took_s = time.monotonic() - begin
    if took_s > SLOW_COMPILE_S:
        log.info("compiled the %s in %.1f s", name, took_s)


def keep_compiled_programs(folder: str | None) -> None:
    """Keeps compiled programs between processes, in `folder` or (auto) the user's cache.

    Does nothing for None, or where JAX_COMPILATION_CACHE_DIR already says where.
    """
    if folder is None or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    if folder == "auto":
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        folder = str(cache / "speechlm2_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # programs compiled before this ran without a cache
