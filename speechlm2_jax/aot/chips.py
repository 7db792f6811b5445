"""TPU chips and topologies; libtpu compiles for them on a machine without TPUs.

Figures are those of Google's system pages (cloud.google.com/tpu/docs/v5e and its siblings): bytes
per second are decimal, those of links are of all links of a chip together.
"""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import topologies

from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.throughput import peak_flops

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Memory and links of one device (its FLOP/s: `training.run.throughput.peak_flops`)."""

    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float


def _chip(memory_gib: int, memory_bytes_per_s: float, link_bytes_per_s: float) -> Chip:
    return Chip(
        memory_bytes=memory_gib * GIB,
        memory_bytes_per_s=memory_bytes_per_s,
        link_bytes_per_s=link_bytes_per_s,
    )


CHIPS: Mapping[str, Chip] = {
    "v5e": _chip(16, 819e9, 200e9),
    "v5p": _chip(95, 2765e9, 600e9),
    "v6e": _chip(32, 1640e9, 448e9),
    "tpu7x": _chip(96, 3690e9, 600e9),  # a chip is two devices, each with half of it
}


_NO_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # the compiler's threads have stacks of 64 KiB, too few for its cost model of matmuls on v6e
    "LIBTPU_INIT_ARGS": "--fibers_default_thread_stack_size=1048576",
}
"""Tells libtpu that this is no TPU host, so that it looks for no devices and takes no lock."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """So many devices of one kind, with the links between them."""

    name: str
    chip: Chip
    flops_per_s: float
    """Dense bf16, of one device."""
    devices: tuple[jax.Device, ...]


def read_topology(name: str, libtpu: Path | None = None) -> Topology:
    """Describes a topology by its name, such as v5e:4x4 or v5p:4x4x4.

    `libtpu` is the folder that `fetch` filled. Raises SettingsError for a name that is not known,
    and for a libtpu that is missing or does not fit this JAX.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise SettingsError(
            f"--compile-for {name}: unknown topology; give a chip and the shape of its mesh, such "
            f"as v5e:4x4 or v5p:4x4x4 (chips: {', '.join(CHIPS)})"
        )
    folder = default_folder() if libtpu is None else libtpu
    if not (folder / "libtpu").is_dir():
        raise SettingsError(
            f"--compile-for needs libtpu, which is not in {folder}; fetch it (about 700 MB) with "
            f"python -m speechlm2_jax.aot.fetch{'' if libtpu is None else f' --to {libtpu}'}"
        )
    sys.path.insert(0, str(folder.resolve()))
    for variable, value in _NO_HOST.items():
        os.environ.setdefault(variable, value)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # libtpu raises various errors for a shape that does not exist
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(f"--compile-for {name}: libtpu cannot compile for it ({reason})") from (
            error
        )
    devices = tuple(described.devices)
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        raise SettingsError(
            f"--compile-for {name}: the peak FLOP/s are unknown of {devices[0].device_kind}"
        )
    return Topology(name=name, chip=CHIPS[kind], flops_per_s=peak, devices=devices)


def default_folder() -> Path:
    """Where libtpu is looked for: a folder of the user's cache, by the version that JAX wants."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "speechlm2_jax" / f"libtpu-{jax.__version__}"


def wanted_libtpu() -> str:
    """The requirement on libtpu that this JAX states for its `tpu` extra."""
    stated = importlib.metadata.requires("jax") or []
    return next(r.partition(";")[0].strip() for r in stated if r.startswith("libtpu"))


def fetch(folder: Path) -> None:
    """Installs the libtpu that fits this JAX into a folder of its own.

    Not into the environment, where JAX would look for TPUs at every start. Raises SettingsError if
    pip fails.
    """
    requirement = wanted_libtpu()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade"]
    done = subprocess.run([*command, "--target", str(folder), requirement])
    if done.returncode:
        raise SettingsError(f"pip could not install {requirement} into {folder}; see above")
