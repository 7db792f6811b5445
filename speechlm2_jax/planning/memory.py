"""Memory of devices, and what compiled programs need of it."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import jax

from speechlm2_jax.aot.programs import is_too_large
from speechlm2_jax.settings import SettingsError

_LIMITS_OF_GROUP = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of the kernel's control groups (version 2 and 1) with the bytes of a container."""


def device_memory(device: jax.Device) -> int:
    """Bytes that programs may use of a device; of a CPU, its share of the machine's memory.

    Raises SettingsError for a device that does not tell.
    """
    if device.platform == "cpu":
        return machine_memory() // jax.local_device_count("cpu")
    stats = device.memory_stats() or {}
    if not stats.get("bytes_limit"):
        raise SettingsError(f"{device.device_kind} does not tell its memory; give --memory-gib")
    return stats["bytes_limit"]


def machine_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of this machine's memory, or of the container that limits it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _LIMITS_OF_GROUP:
        path = groups / name
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def program_bytes(compile_it: Callable[[], jax.stages.Compiled]) -> float:
    """Bytes that a device needs to run a program: arguments, results and scratch.

    Infinite if the compiler finds that it does not fit. Raises SettingsError if the compiler does
    not tell.
    """
    try:
        stats = compile_it().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if is_too_large(error):
            return math.inf
        raise
    if stats is None or not stats.temp_size_in_bytes:
        raise SettingsError("this device's compiler does not tell the memory of its programs")
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
