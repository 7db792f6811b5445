"""Terminal output: log lines, phases with their seconds, and a progress bar.

It imports neither JAX nor NumPy, so that the first line can come before they are imported.
"""

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

PACKAGE_LOGGER = "speechlm2_jax"
FIRST_NOTE_S = 2.0
"""A phase that takes longer is logged, so that the program does not look hung."""
NEXT_NOTES_S = 30.0
"""Seconds between two log lines of a long phase."""
RECORDS_KEPT = 200
"""Log records kept until the run directory exists; they are then written to train.log."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells: 128 + SIGINT."""
INDEX_KEPT = "chunks of indexes that were read are kept, and the same command resumes"
"""What Ctrl-C leaves of a command that reads data and writes a file at its end."""

log = logging.getLogger(__name__)


class Terminal(logging.Handler):
    """Writes log records above a progress bar where there is one, to standard output by default.

    `is_stderr`: to standard error, for programs whose output is their result.
    """

    def __init__(self, *, is_stderr: bool = False) -> None:
        super().__init__()
        self._is_stderr = is_stderr
        self._records: deque[logging.LogRecord] | None = deque(maxlen=RECORDS_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record and keeps it for train.log."""
        try:
            stream = sys.stderr if self._is_stderr else sys.stdout
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except BrokenPipeError:  # the reader of the pipe has ended; train.log is still written
            pass
        except Exception:  # as logging's own handlers: a failed write must not end a training
            self.handleError(record)
        if self._records is not None:
            self._records.append(record)

    def take_records(self) -> list[logging.LogRecord]:
        """The records so far; later ones are not kept."""
        records, self._records = list(self._records or ()), None
        return records


class _Output:
    """A standard stream that drops its output once the reader has ended (`train.py | head`)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, unless the pipe is closed."""
        with self._unless_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, unless the pipe is closed."""
        with self._unless_closed():
            self._stream.flush()

    @contextmanager
    def _unless_closed(self) -> Generator[None]:
        try:
            yield
        except BrokenPipeError:  # later output, of any library too, goes to /dev/null
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_closed_pipes() -> None:
    """Keeps this process running after the reader of its stdout or stderr has ended."""
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)


@contextmanager
def showing(*, is_shown: bool = True, is_stderr: bool = False) -> Generator[Terminal]:
    """Shows the package's log records while open; nested calls share one handler.

    `is_shown` is False on all processes of a run but the first. `is_stderr` shows them on standard
    error instead of standard output.
    """
    logger = logging.getLogger(PACKAGE_LOGGER)
    outer = next((h for h in logger.handlers if isinstance(h, Terminal)), None)
    terminal = Terminal(is_stderr=is_stderr) if outer is None else outer
    before = logger.level, logger.propagate, terminal.level
    terminal.setLevel(logging.NOTSET if is_shown else logging.CRITICAL + 1)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger would repeat every line
    if outer is None:
        logger.addHandler(terminal)
    try:
        yield terminal
    finally:
        if outer is None:
            logger.removeHandler(terminal)
        logger.level, logger.propagate = before[:2]
        terminal.setLevel(before[2])


@contextmanager
def phase(name: str) -> Generator[None]:
    """Logs a slow phase: after two seconds, then every half minute, and how long it took."""
    begin, is_done = time.monotonic(), threading.Event()

    def remind() -> None:
        if is_done.wait(FIRST_NOTE_S):
            return
        log.info("%s ...", name)
        while not is_done.wait(NEXT_NOTES_S):
            log.info("%s ... %.0f s", name, time.monotonic() - begin)

    reminder = threading.Thread(target=remind, name="phase", daemon=True)
    reminder.start()
    try:
        yield
    finally:
        is_done.set()
        reminder.join()
    took_s = time.monotonic() - begin
    if took_s > FIRST_NOTE_S:
        log.info("%s took %.1f s", name, took_s)


def counted(count: int, what: str) -> str:
    """A count with its noun: 1 recording, 2 recordings."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def log_line(text: str) -> None:
    """Logs one line."""
    log.info("%s", text)


@contextmanager
def one_line_errors(
    program: str, kinds: Sequence[type[Exception]], *, kept: str = "nothing was changed"
) -> Generator[None]:
    """Turns errors that a user can fix, and Ctrl-C, into one line on stderr and an exit code.

    `kept` is what the line names after Ctrl-C.
    """
    try:
        yield
    except tuple(kinds) as error:
        print(f"{program}:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {kept}", file=sys.stderr)
        sys.exit(INTERRUPTED)


class ProgressBar:
    """Steps, loss, learning rate and speed on the last line of a terminal.

    Files and pipes get the log lines only.
    """

    def __init__(self, *, total: int | None, done: int, is_wanted: bool):
        """`total` steps, None where the end is not known; `done` of them before now."""
        self._bar: tqdm | None = None
        if is_wanted and sys.stdout.isatty():
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}" if total else "step {n_fmt}"
            self._bar = tqdm(
                total=total,
                initial=done,
                file=sys.stdout,
                bar_format=form + "  {desc}",
                dynamic_ncols=True,
                leave=False,
            )

    @property
    def is_drawn(self) -> bool:
        """False if drawing would do nothing, so that its text need not be computed."""
        return self._bar is not None

    def draw(self, step: int, text: str) -> None:
        """Moves the bar to `step` and shows `text`."""
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()


def exit_now(message: str) -> None:
    """Ends the process at once, from any thread, without clean-up."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
    os._exit(INTERRUPTED)
