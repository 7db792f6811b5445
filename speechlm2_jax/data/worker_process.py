"""What a process that reads batches needs: how it begins, and what goes to it and comes back.

Grain starts such a process by `spawn`, sends it the pipeline, and gives the arrays of its batches
back in shared memory. It computes nothing on a device, and ends with the run, however that ends.
"""

import io
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from dataclasses import replace
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from speechlm2_jax.data.frame_counts import CachedFrameCount

if TYPE_CHECKING:
    from speechlm2_jax.data.pipeline import Delivered

_MAPPED_BYTES = 1 << 16
"""Smaller arrays of a mapped file are copied."""
Packed = tuple[bytes, tuple[np.ndarray, ...]]
"""A pickled batch, and the bytes of its arrays, which Grain puts into shared memory."""
_logged: "SimpleQueue[logging.LogRecord]" = SimpleQueue()
"""Of a worker: what the next batch takes along."""


def dumps(value: Any) -> bytes:
    """Pickles what a worker reads with. Mapped files stay where they are, and so do models."""
    target = io.BytesIO()
    _Pickler(target, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return target.getvalue()


def loads(data: bytes) -> Any:
    """The inverse of `dumps`."""
    return pickle.loads(data)  # noqa: S301 - by the parent process


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray) and obj.nbytes >= _MAPPED_BYTES:
            return _mapping(obj)
        if isinstance(obj, CachedFrameCount):
            return obj.without_model()
        return NotImplemented


def _mapping(array: np.ndarray) -> Any:
    """How to map an array that lies in a mapped file; NotImplemented for another one."""
    if array.ndim and not any(array.strides):  # one value again and again
        return np.broadcast_to, (array.flat[0], array.shape)
    base: Any = array
    while isinstance(base, np.ndarray) and isinstance(base.base, np.ndarray):
        base = base.base
    if not isinstance(base, np.memmap) or not array.flags.c_contiguous:
        return NotImplemented
    place = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return _map, (str(base.filename), base.offset + place, array.dtype, array.shape)


def _map(path: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


def packed(delivered: "Delivered") -> Packed:
    """In the worker: a batch as bytes and flat arrays, with what was logged since the last one."""
    logged: list[logging.LogRecord] = []
    while not _logged.empty():
        logged.append(_logged.get())
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(replace(delivered, log=logged), 5, buffer_callback=buffers.append)
    return data, tuple(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers)


def unpacked(packed: Packed) -> "Delivered":
    """In the run: the batch, copied out of the shared memory. Its log is handed on."""
    data, arrays = packed
    copies = [bytearray(array) for array in arrays]  # shared memory must not outlive the run
    delivered: Delivered = pickle.loads(data, buffers=copies)  # noqa: S301 - by our own worker
    for record in delivered.log:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    return delivered


def parse_flags() -> None:
    """Lets Grain read its flags, which it demands of a program that starts processes."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def initialize(level: int, index: int, count: int) -> None:
    """Begins a worker: keeps its log, leaves signals and devices to the run, and ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the run, which ends its workers
        signal.signal(number, signal.SIG_IGN)
    if (jax := sys.modules.get("jax")) is not None:  # batches and Grain import it
        jax.config.update("jax_platforms", "cpu")
    logging.getLogger().handlers = [QueueHandler(_logged)]  # it makes text of what they hold
    logging.getLogger("speechlm2_jax").setLevel(level)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
