"""The run directory: settings, command line, environment, and train.log."""

import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path

import jax
import yaml

from speechlm2_jax import console
from speechlm2_jax.checkpointing import CHECKPOINTS, read_ranking, step_folders
from speechlm2_jax.console import PACKAGE_LOGGER
from speechlm2_jax.object_store.folders import address_of, shown
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.disk_errors import RunLog

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
COMMAND = "command.txt"
ENVIRONMENT = "environment.txt"
LOG = "train.log"
MODEL = "model"
"""Folder with all files of the model except the weights."""
METRICS = "metrics.jsonl"
DATA_ERRORS = "data_errors.jsonl"
"""Recordings that could not be used; other processes have `data_errors.1.jsonl` and so on."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "lhotse", "grain")
"""Packages whose versions are recorded, and must be the same in all processes of a run."""
_VARIABLES = ("JAX_", "XLA_", "CUDA_", "TPU_", "LIBTPU_")
_SCRIPT, _INSTALLED = "train.py", "speechlm2-jax"
_RUNS = "runs"
"""Folder in which evaluate.py looks for the newest run."""
_LAST_STEP = "trainer.max_steps"


def create(run_dir: Path) -> None:
    """Makes the directory. Raises SettingsError if it cannot be written."""
    probe = run_dir / f".writable{jax.process_index()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("yes")
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"the run directory {run_dir} cannot be written ({error.strerror}); "
            "choose another exp_manager.explicit_log_dir"
        ) from error


def describe(run_dir: Path, settings: Mapping[str, object]) -> None:
    """Writes config.yaml, and appends this start to command.txt and environment.txt.

    A config.yaml with other contents is renamed to config.0.yaml, config.1.yaml, ...
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
    """Sends the package's log records to the terminal, and to train.log of a run directory.

    Records that the terminal showed before are written to train.log too. Only the first process
    writes.
    """
    is_first = jax.process_index() == 0
    with ExitStack() as stack:
        shown = stack.enter_context(console.showing(is_shown=is_first))
        if is_first and run_dir is not None:
            to_file = RunLog(run_dir / LOG, encoding="utf-8")
            stack.callback(to_file.close)
            to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            for record in shown.take_records():
                to_file.handle(record)
            logger = logging.getLogger(PACKAGE_LOGGER)
            logger.addHandler(to_file)
            stack.callback(logger.removeHandler, to_file)
        yield


def checkpoints_line(run_dir: Path) -> str:
    """A line that names the last and the best checkpoint; empty if there are none."""
    folder = run_dir / CHECKPOINTS
    steps = [path.name for path in step_folders(folder)]
    if not steps:
        return ""
    ranking = read_ranking(folder)
    present = {step: values for step, values in ranking.metrics.items() if str(step) in steps}
    best = ranking.retention.best(present)
    line = f"checkpoints: step {steps[0]} is the last"
    if best:
        monitor = ranking.retention.monitor
        line += f", step {best[0]} the best ({monitor} {present[best[0]][monitor]:.4f})"
    return f"{line}; in {shown(run_dir)}/{CHECKPOINTS}"


def log_next_commands(run_dir: Path | None, *, step: int, is_finished: bool) -> None:
    """Logs the last and the best checkpoint, and the commands to type next."""
    if run_dir is not None and (line := checkpoints_line(run_dir)):
        log.info("%s", line)
    if run_dir is not None:
        log.info("%s", curves_line(run_dir))
    log.info(next_line(run_dir, step=step, is_finished=is_finished))


def curves_line(run_dir: Path) -> str:
    """A line with the commands that show the curves of a run."""
    page = "curves.html" if address_of(run_dir) else run_dir / "curves.html"
    command = f"{_INSTALLED} runs {shown(run_dir)} --html {page}"
    events = run_dir / "tensorboard"
    return f"curves: {command}" + (f"  |  tensorboard --logdir {events}" if events.is_dir() else "")


def next_line(run_dir: Path | None, *, step: int, is_finished: bool) -> str:
    """A line that tells what to do next: commands if train.py runs, else calls of `fit`."""
    is_command = _program() is not None
    if not is_finished:
        return f"next: {_command()}  to resume" if is_command else "next: call fit again to resume"
    longer = {_LAST_STEP: str(2 * step)}
    longer_run = _command(longer) if is_command else f"fit with {_LAST_STEP}={2 * step}"
    if run_dir is None:
        return f"next: {longer_run}  to train longer"
    is_newest = run_dir.parent == Path(_RUNS)
    evaluate = "python evaluate.py" if _program() == _SCRIPT else f"{_INSTALLED} evaluate"
    evaluate += "" if is_newest else f" pretrained_name={shown(run_dir)}"
    report = "" if address_of(run_dir) else f"  (report: {run_dir / 'report.html'})"
    return f"next: {evaluate}{report}  |  {longer_run}  to train longer"


def _command(overrides: Mapping[str, str] | None = None) -> str:
    """The command line of this process, with `overrides` for some keys."""
    arguments = sys.argv[1:]
    for key, value in (overrides or {}).items():
        arguments = [a for a in arguments if a.lstrip("+").partition("=")[0] != key]
        arguments.append(f"{key}={value}")
    program = ["python", sys.argv[0]] if _program() == _SCRIPT else [_INSTALLED]
    return shlex.join([*program, *arguments])


def _program() -> str | None:
    """The program of this process, if it is a command that trains."""
    name = Path(sys.argv[0]).name
    is_installed = name in (_INSTALLED, "__main__.py") and sys.argv[1:2] == ["train"]
    return _INSTALLED if is_installed else name if name == _SCRIPT else None


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
    for package in PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    variables = sorted(k for k in os.environ if k.startswith(_VARIABLES))
    return [*lines, *(f"{name}={os.environ[name]}" for name in variables)]
