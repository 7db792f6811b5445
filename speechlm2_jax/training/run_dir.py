"""The run directory: what was asked (config, command), on what (environment), and what was said."""

import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml

from speechlm2_jax.settings import SettingsError

CONFIG = "config.yaml"
COMMAND = "command.txt"
ENVIRONMENT = "environment.txt"
LOG = "train.log"
MODEL = "model"
"""All of the model but its weights."""
METRICS = "metrics.jsonl"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "lhotse", "grain")
_VARIABLES = ("JAX_", "XLA_", "CUDA_", "TPU_", "LIBTPU_")
PACKAGE_LOGGER = "speechlm2_jax"


def create(run_dir: Path) -> None:
    """Makes the directory. Raises SettingsError if it cannot be written."""
    probe = run_dir / ".writable"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("yes")
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"the run directory {run_dir} cannot be written ({error.strerror}); "
            "choose another exp_manager.explicit_log_dir"
        ) from error


def describe(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Writes config.yaml, and adds this start to command.txt and environment.txt.

    A config.yaml with other contents is kept under a number.
    """
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    config = run_dir / CONFIG
    if config.exists() and config.read_text(encoding="utf-8") != text:
        number = len(list(run_dir.glob("config.*.yaml")))
        config.rename(run_dir / f"config.{number}.yaml")
    config.write_text(text, encoding="utf-8")
    stamp = time.strftime("# %Y-%m-%d %H:%M:%S %z")
    _append(run_dir / COMMAND, [stamp, shlex.join([sys.executable, *sys.argv])])
    _append(run_dir / ENVIRONMENT, [stamp, *_environment()])


@contextmanager
def logging_to(run_dir: Path | None) -> Iterator[None]:
    """Sends the package's log records to the terminal, and to train.log of a run directory."""
    logger = logging.getLogger(PACKAGE_LOGGER)
    level = logger.level
    handlers: list[logging.Handler] = []
    if jax.process_index() == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
        if run_dir is not None:
            to_file = logging.FileHandler(run_dir / LOG, encoding="utf-8")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            handlers.append(to_file)
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger would repeat every line
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = True
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _append(path: Path, lines: list[str]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _environment() -> list[str]:
    devices = jax.devices()
    lines = [
        f"python {platform.python_version()} on {platform.platform()}",
        f"devices {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
        f"{jax.process_count()} processes",
    ]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    variables = sorted(k for k in os.environ if k.startswith(_VARIABLES))
    return [*lines, *(f"{name}={os.environ[name]}" for name in variables)]
