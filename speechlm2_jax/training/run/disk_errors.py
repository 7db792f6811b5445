"""A disk that cannot be written any more ends a run in a few lines, not in tracebacks."""

import errno
import logging
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from speechlm2_jax.checkpointing import CHECKPOINTS, step_folders

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSING = (errno.EROFS, errno.EACCES, errno.EPERM)
_WORDS = (
    # what libraries written in C++ make of the same errors, which come as text
    ("No space left on device", FULL[0]),
    ("RESOURCE_EXHAUSTED: Error writing", FULL[0]),
    ("quota exceeded", FULL[1]),
    ("File too large", FULL[2]),
    ("Read-only file system", REFUSING[0]),
    ("PERMISSION_DENIED: Error writing", REFUSING[1]),
)
_WHAT = {
    FULL[0]: "the disk is full",
    FULL[1]: "the quota of this disk is used up",
    FULL[2]: "a file is larger than this disk or user may have",
    REFUSING[0]: "the disk is mounted read-only",
    REFUSING[1]: "writing is not permitted",
    REFUSING[2]: "writing is not permitted",
}


class DiskError(RuntimeError):
    """A run that ended because its directory could not be written any more."""


class RunLog(logging.FileHandler):
    """train.log. A failure to write it is told once and ends nothing."""

    _has_told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Tells what failed, the first time."""
        if not self._has_told:
            self._has_told = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        """Closes the file; what could not be written is lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def disk_errors(run_dir: Path | None) -> Generator[None]:
    """Turns what a disk refuses into a DiskError: what is wrong, what is left, and what to do."""
    hook = sys.unraisablehook
    sys.unraisablehook = _without_closed_loops(hook)
    try:
        yield
    except Exception as error:
        problem = None if run_dir is None else disk_problem(error)
        if problem is None or run_dir is None:
            raise
        if problem in REFUSING and str(run_dir.absolute()) not in str(error):
            raise  # of something that is read
        raise DiskError(_told(run_dir, problem, error)) from error
    finally:
        sys.unraisablehook = hook


def disk_problem(error: BaseException) -> int | None:
    """The number of a disk's refusal behind an error, None if there is none."""
    seen: list[BaseException] = [error]
    for one in seen:
        if isinstance(one, OSError) and one.errno in _WHAT:
            return one.errno
        if isinstance(one, BaseExceptionGroup):
            seen += one.exceptions
        seen += [e for e in (one.__cause__, one.__context__) if e is not None and e not in seen]
    text = "\n".join(str(one) for one in seen)
    return next((number for words, number in _WORDS if words in text), None)


def _told(run_dir: Path, problem: int, error: BaseException) -> str:
    steps = step_folders(run_dir / CHECKPOINTS)
    kept = f"step {steps[0].name}" if steps else "none"
    remedy = "free some space" if problem in FULL else "let it be written"
    return (
        f"{run_dir} cannot be written: {_WHAT[problem]}\n"
        f"  {' '.join(str(error).split())[:300]}\n"
        f"  the last complete checkpoint: {kept}\n"
        f"  to go on, {remedy} and give the same command again; fewer checkpoints are kept with "
        "exp_manager.checkpoint_callback_params.save_top_k"
    )


def _without_closed_loops(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Leaves out what Orbax's writers say after the one that failed has ended their loop."""

    def filtered(raised: Any) -> None:
        error = raised.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            hook(raised)

    return filtered
