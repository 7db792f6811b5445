"""A full or read-only disk ends a run with a short message instead of tracebacks."""

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
_MESSAGES = (
    # libraries written in C++ report the same errors as text, without an errno
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
    """The run directory can no longer be written."""


class RunLog(logging.FileHandler):
    """train.log. A failed write prints one warning and does not stop the run."""

    _has_warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Prints the first failure; later ones are silent."""
        if not self._has_warned:
            self._has_warned = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        """Closes the file. Records that could not be written are lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def disk_errors(run_dir: Path | None) -> Generator[None]:
    """Turns a failed write into a DiskError that names the cause and the last checkpoint."""
    hook = sys.unraisablehook
    sys.unraisablehook = _without_closed_loops(hook)
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        problem = None if run_dir is None else disk_problem(error)
        if problem is None or run_dir is None:
            raise
        if problem in REFUSING and str(run_dir.absolute()) not in str(error):
            raise  # the error is of a file that is read, not written
        raise DiskError(_message(run_dir, problem, error)) from error
    finally:
        sys.unraisablehook = hook


def disk_problem(error: BaseException) -> int | None:
    """The errno of the disk error that caused an exception; None if no disk error did."""
    seen: list[BaseException] = [error]
    for one in seen:
        if isinstance(one, OSError) and one.errno in _WHAT:
            return one.errno
        if isinstance(one, BaseExceptionGroup):
            seen += one.exceptions
        seen += [e for e in (one.__cause__, one.__context__) if e is not None and e not in seen]
    text = "\n".join(str(one) for one in seen)
    return next((number for message, number in _MESSAGES if message in text), None)


def _message(run_dir: Path, problem: int, error: BaseException) -> str:
    steps = step_folders(run_dir / CHECKPOINTS)
    kept = f"step {steps[0].name}" if steps else "none"
    remedy = "free some space" if problem in FULL else "let it be written"
    return (
        f"{run_dir} cannot be written: {_WHAT[problem]}\n"
        f"  {' '.join(str(error).split())[:300]}\n"
        f"  the last complete checkpoint: {kept}\n"
        f"  to resume, {remedy} and run the same command again; fewer checkpoints are kept with "
        "exp_manager.checkpoint_callback_params.save_top_k"
    )


def _without_closed_loops(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """Hides "Event loop is closed": other writers of Orbax raise it after one has failed."""

    def filtered(raised: Any) -> None:
        error = raised.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            hook(raised)

    return filtered
