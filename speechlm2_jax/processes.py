"""Several processes of one run: how they connect, agree, and stop together.

Each process runs the same program on all devices (one process per host on TPU, one per GPU or node
with SLURM, any number under `speechlm2_jax.launch`). With one process these functions do nothing.
"""

import os
import sys
import traceback
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from speechlm2_jax.launch import COORDINATOR, COUNT, HEARTBEAT, INDEX, start_heartbeat
from speechlm2_jax.settings import SettingsError

HEARTBEAT_S = 100
"""A process without a heartbeat for so long counts as dead, and the others end."""
_CLUSTER_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
_CLUSTER_LISTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_LONGEST_TEXT = 4096


def initialize(nodes: int = 1) -> None:
    """Connects the processes of the run; called before JAX initialises its devices.

    The launcher sets the address in environment variables. JAX itself detects SLURM, Open MPI,
    GKE and Cloud TPU, the last only if `nodes` (trainer.num_nodes) is above 1. Raises SettingsError
    if the processes cannot connect.
    """
    if jax.distributed.is_initialized() or not (nodes > 1 or _has_several_processes()):
        return
    start_heartbeat()
    has_launcher = COORDINATOR in os.environ
    try:
        jax.distributed.initialize(
            coordinator_address=os.environ.get(COORDINATOR),
            num_processes=int(os.environ[COUNT]) if has_launcher else None,
            process_id=int(os.environ[INDEX]) if has_launcher else None,
            heartbeat_timeout_seconds=int(os.environ.get(HEARTBEAT, HEARTBEAT_S)),
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise SettingsError(
            f"the processes of this run cannot connect ({error}); start one per node, with srun, "
            "python -m speechlm2_jax.launch, or set trainer.num_nodes=1"
        ) from error


def are_several() -> bool:
    """Whether this is one of several connected processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


@contextmanager
def exit_on_error() -> Generator[None]:
    """Ends a failed process of a multi-process run at once.

    A normal exit would wait for the other processes, which wait for its part of a step.
    """
    try:
        yield
    except BaseException as error:
        if not are_several():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        try:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also if a full disk takes no more of the output
            os._exit(code if isinstance(code, int) else 1)


def broadcast_text(text: str) -> str:
    """The first process's text, on all processes, which all must call it. At most 4096 bytes."""
    if jax.process_count() == 1:
        return text
    encoded = text.encode()
    padded = np.zeros(_LONGEST_TEXT, np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0").decode()


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, which all must call it, in their order."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int64(len(encoded))))
    if not sizes.max():
        return [""] * len(sizes)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(encoded)] = encoded
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes.tolist(), strict=True)]


def of_first(indices: Iterable[int], total: int) -> frozenset[int]:
    """The first process's indices, of `total`, on all processes, which all must call it."""
    if jax.process_count() == 1:
        return frozenset(indices)
    flags = np.zeros(total, np.bool_)
    flags[list(indices)] = True
    flags = np.asarray(multihost_utils.broadcast_one_to_all(flags))
    return frozenset(np.flatnonzero(flags).tolist())


def largest(value: int) -> int:
    """The largest of the numbers that the processes give, which all must call it."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int64(value))))


def barrier(where: str) -> None:
    """Returns when every process has reached it. `where` is the same name on all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def reached_stop_point(calls: int) -> bool:
    """Whether all processes are to stop now; True once, in the same call on all of them.

    `calls` counts the calls; every process calls it equally often. JAX watches for
    SIGTERM and lets the processes agree in the background, so asking costs next to nothing.
    """
    return multihost_utils.reached_preemption_sync_point(calls)


def _has_several_processes() -> bool:
    environment = os.environ
    sizes = [environment.get(name, "") for name in _CLUSTER_SIZES]
    lists = [environment.get(name, "") for name in _CLUSTER_LISTS]
    return (
        COORDINATOR in environment
        or any(size.isdigit() and int(size) > 1 for size in sizes)
        or any("," in hosts for hosts in lists)
    )
