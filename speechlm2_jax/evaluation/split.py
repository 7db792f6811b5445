"""An evaluation that is split over several processes, which exchange responses through files.

Each process generates every n-th response, longest input first, and writes them to a file of its
own beside the output manifest (`NAME.part-0`). At the end the first process adds these rows to the
manifest, computes the scores and writes the report. After a failure the rows are there: the same
command resumes, also with another number of processes.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax

from speechlm2_jax import processes
from speechlm2_jax.evaluation.journal import Journal, part_file, rows_after, session_of
from speechlm2_jax.settings import SettingsError

POLL_S = 0.5
"""Seconds between two looks at the files of the other processes."""


class ProcessPart:
    """What one of several processes does of an evaluation."""

    def __init__(self, index: int, count: int, session: str, files: Sequence[Path]) -> None:
        """`files` are those of all processes; `session` names this start of the evaluation."""
        self.name = f"{session}/{index}"
        """Names this process in the progress of its rows."""
        self._index, self._count, self._files = index, count, files
        self._sizes = dict.fromkeys(files[1:], 0)
        self._headers = set(files[1:])
        self._missing = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the output."""
        return self._index == 0

    def of_others(self, order: Sequence[int]) -> frozenset[int]:
        """The inputs, of those to be done in this order, that other processes do."""
        others = frozenset(order) - frozenset(order[self._index :: self._count])
        self._missing = len(others)
        return others

    def done_by_others(self) -> int:
        """Rows that the other processes have written since the last call; 0 but on the first."""
        if not self.is_first:
            return 0
        new = 0
        for file, size in self._sizes.items():
            lines, self._sizes[file] = rows_after(file, size)
            if lines and file in self._headers:
                self._headers.discard(file)
                lines -= 1
            new += lines
        self._missing -= new
        return new

    def wait(self, progress: Callable[[int], None]) -> None:
        """On the first process, waits until all rows are written; `progress` counts them.

        On the others, waits until the first process has taken their rows over.
        """
        while self._missing > 0 if self.is_first else self._files[0].exists():
            time.sleep(POLL_S)
            if new := self.done_by_others():
                progress(new)


def left_out(
    done: Iterable[int], order: Sequence[int], part: ProcessPart | None, *, is_joint: bool
) -> frozenset[int]:
    """The inputs that this process does not generate: those that are done, or that others do.

    `order` is the order of all inputs. With `is_joint` all processes do the same, and what is done
    is what the first one knows to be done.
    """
    kept = processes.of_first(done, len(order)) if is_joint else frozenset(done)
    if part is None:
        return kept
    return kept | part.of_others([index for index in order if index not in kept])


class SplitJournal:
    """The files of a split evaluation: what this process writes, and how the parts become one."""

    def __init__(self, path: Path, open_file: Callable[[Path], Journal]) -> None:
        """`open_file` opens the journal of a file of this evaluation.

        Raises SettingsError if the processes do not share the folder of the output manifest.
        """
        index, count = jax.process_index(), jax.process_count()
        files = [part_file(path, i) for i in range(count)]
        session = processes.broadcast_text(secrets.token_hex(8))
        self._whole = open_file(path) if index == 0 else None
        if self._whole is not None:
            self.take_parts()
            self.own = self._opened(open_file, files[0], path, session)
        processes.barrier("evaluation: the first process has the rows of earlier ones")
        if index and session_of(files[0]) != session:
            raise SettingsError(
                f"output_manifest: process {index} does not see {files[0]} of the first process; "
                "name a file in a folder that all processes share"
            )
        if index:
            self.own = self._opened(open_file, files[index], path, session)
        self.own.note = None if self._whole is None else self._whole.note
        self.own.part = ProcessPart(index, count, session, files)

    def take_parts(self) -> Journal | None:
        """The journal with the rows of all processes; None but on the first process."""
        if self._whole is not None:
            self._whole.adopt_parts()
        return self._whole

    @staticmethod
    def _opened(
        open_file: Callable[[Path], Journal], file: Path, whole: Path, session: str
    ) -> Journal:
        own = open_file(file)
        own.read_also(whole)
        own.start(session)
        return own
