"""Several processes that are one run: how they meet, agree, and stop together.

Each sees all devices and runs the same program (one per host on TPU, one per GPU or node with
SLURM, any number under `speechlm2_jax.launch`). With one process nothing here does anything.
"""

import os
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from speechlm2_jax.launch import COORDINATOR, COUNT, HEARTBEAT, INDEX, start_heartbeat
from speechlm2_jax.settings import SettingsError

HEARTBEAT_S = 100
"""A process not heard of for so long is taken for dead, and the others end."""
_CLUSTER_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
_CLUSTER_LISTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_LONGEST_TEXT = 4096


def initialize(nodes: int = 1) -> None:
    """Meets the other processes of the run; called before anything asks for devices.

    The launcher's variables say where; SLURM, Open MPI, GKE and Cloud TPU are recognised by JAX
    itself, the last only where `nodes` (trainer.num_nodes) is above 1. Raises SettingsError if they
    do not meet.
    """
    if jax.distributed.is_initialized() or not (nodes > 1 or _has_several_processes()):
        return
    start_heartbeat()
    given = COORDINATOR in os.environ
    try:
        jax.distributed.initialize(
            coordinator_address=os.environ.get(COORDINATOR),
            num_processes=int(os.environ[COUNT]) if given else None,
            process_id=int(os.environ[INDEX]) if given else None,
            heartbeat_timeout_seconds=int(os.environ.get(HEARTBEAT, HEARTBEAT_S)),
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise SettingsError(
            f"the processes of this run did not meet ({error}); start one per node, with srun, "
            "python -m speechlm2_jax.launch, or set trainer.num_nodes=1"
        ) from error


@contextmanager
def exit_on_error() -> Generator[None]:
    """Ends a process of several at once when it fails.

    It would else wait for the others before it goes, while they wait for its part of a step.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def broadcast_text(text: str) -> str:
    """The first process's text, on all of them. Every process must call it. At most 4096 bytes."""
    if jax.process_count() == 1:
        return text
    encoded = text.encode()
    padded = np.zeros(_LONGEST_TEXT, np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0").decode()


def barrier(where: str) -> None:
    """Returns when every process has come here. `where` is the same on all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def reached_stop_point(calls: int) -> bool:
    """Whether all are to stop now; True in all of them at the same question, and once.

    `question` counts how often it was asked; every process asks equally often. JAX watches for
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
