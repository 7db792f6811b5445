"""Builds the index of a manifest: stretches of it in parallel, each kept as soon as it is read."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

import numpy as np
from tqdm import tqdm

from speechlm2_jax.data.index.storage import Columns
from speechlm2_jax.data.index.worker import Job, reader_of, save_chunk
from speechlm2_jax.settings import SettingsError

CHUNK_BYTES = (1 << 21, 1 << 24)
"""Least and most of a manifest that a process reads at once, and reads again after a stop."""
_CHUNKS = 64
"""Of a manifest between: enough for processes to end together."""
ALONE_BYTES = 1 << 23
"""A smaller manifest is read sooner than processes start."""
MOST_PROCESSES = 32

Task = tuple[Path, int, int]
"""The file of a chunk, and the stretch of the manifest."""


def bar_of(name: str, total: int, done: int = 0) -> tqdm:
    """A progress bar in bytes, where there is a terminal."""
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    )


def read_chunks(folder: Path, job: Job, size: int) -> Sequence[Columns]:
    """The columns of a manifest in chunks, in order, each in memory only while it is asked for.

    Chunks that `folder` already has are not read again. Raises SettingsError for a line that
    cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = min(max(size // _CHUNKS, CHUNK_BYTES[0]), CHUNK_BYTES[1])
    starts = range(0, max(size, 1), step)
    tasks = [(folder / f"{n:06d}.npz", a, min(a + step, size)) for n, a in enumerate(starts)]
    missing = [task for task in tasks if not _is_whole(task[0])]
    done = size - sum(end - start for _, start, end in missing)
    with bar_of(f"indexing {job.manifest.name}", size, done) as bar:
        for _, start, end in _done(job, missing):
            bar.update(end - start)
    return _chunks([path for path, _, _ in tasks])


def _is_whole(path: Path) -> bool:
    """Whether a chunk is there, and none of it is damaged."""
    try:
        with zipfile.ZipFile(path) as columns:
            return columns.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error):
        return False


def remove_chunks(folder: Path) -> None:
    """Removes the chunks of a build that is finished."""
    shutil.rmtree(folder, ignore_errors=True)


def _done(job: Job, tasks: list[Task]) -> Iterator[Task]:
    """Does tasks, in processes of their own if that is worth it; yields each when it is done."""
    if sum(end - start for _, start, end in tasks) <= ALONE_BYTES:
        reader = reader_of(job)
        for path, start, end in tasks:
            save_chunk(path, reader.read(start, end))
            yield path, start, end
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(cores or 1, len(tasks), MOST_PROCESSES)
    todo: SimpleQueue[Task] = SimpleQueue()
    done: SimpleQueue[Task | BaseException] = SimpleQueue()
    for task in tasks:
        todo.put(task)
    with ExitStack() as stack:  # on an error: ends the processes, then the threads, then the pipes
        workers = [_Worker(job) for _ in range(count)]
        for worker in workers:
            stack.callback(worker.close)
        pool = stack.enter_context(ThreadPoolExecutor(count, thread_name_prefix="index"))
        for worker in workers:
            stack.callback(worker.end)
        for worker in workers:
            pool.submit(worker.work, todo, done)
        for _ in tasks:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result


class _Worker:
    """A process that reads chunks."""

    def __init__(self, job: Job) -> None:
        paths = (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", ""))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "speechlm2_jax.data.index.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches only the program, which ends its processes
            env={
                **os.environ,
                "TOKENIZERS_PARALLELISM": "false",  # there are as many processes as cores
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )
        self._job = pickle.dumps(job)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Closes the pipes of a process that has ended."""
        with suppress(OSError):  # what it was not told any more
            self._input.close()
        self._output.close()

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def work(self, todo: "SimpleQueue[Task]", done: "SimpleQueue[Task | BaseException]") -> None:
        """Does tasks until none is left, or one fails."""
        try:
            self._input.write(struct.pack("<Q", len(self._job)) + self._job)
            while (task := _next(todo)) is not None:
                path, start, end = task
                self._input.write(json.dumps([str(path), start, end]).encode() + b"\n")
                self._input.flush()
                response = self._output.readline()
                if not response:
                    raise SettingsError(
                        "a process that reads a manifest for its index has ended; was it killed, "
                        "for its memory? Start again: what was read is kept"
                    )
                result = json.loads(response)
                if "errno" in result:
                    raise OSError(result["errno"], result["error"])
                if "error" in result:
                    raise SettingsError(result["error"])
                done.put(task)
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            done.put(error)


def _next(tasks: "SimpleQueue[Task]") -> Task | None:
    try:
        return tasks.get_nowait()
    except Empty:
        return None


class _Chunk(Mapping[str, np.ndarray]):
    """The columns of a chunk, read when they are asked for."""

    def __init__(self, path: Path, first: int) -> None:
        self._path, self._first = path, first
        with np.load(path) as columns:
            self._names = columns.files
            self.rows = len(columns["flags"]) if "flags" in columns else 0

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self._path) as columns:
            column = columns[name]
        return column + np.uint64(self._first) if name == "several" else column

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _chunks(paths: Sequence[Path]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for path in paths:
        first = chunks[-1]._first + chunks[-1].rows if chunks else 0
        chunks.append(_Chunk(path, first))
    return chunks
