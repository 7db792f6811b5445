"""Starts several processes of one run on this machine.

    python -m speechlm2_jax.launch -n 2 train.py --config salm

Only the first process prints. If one fails, the end of its stderr is shown and the others are
ended. If one stalls, JAX aborts the others after the heartbeat limit, and the stalled one is named.
Ctrl-C and SIGTERM let the whole run save and stop; a second Ctrl-C ends it at once. On CPU each
process has `--cpu-devices` devices. One machine of GPUs or TPUs needs no launcher: a single process
sees all devices. Processes started by SLURM, GKE or Cloud TPU find each other without it.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax.exit_codes import UNFINISHED

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables: the coordinator's address, number of processes, index of this one."""
HEARTBEAT = "SPEECHLM2_JAX_HEARTBEAT_S"
BEATS = "SPEECHLM2_JAX_BEATS"
"""The launcher's folder of one file per process, touched every `BEAT_S` while that process runs."""
BEAT_S = 0.5
SILENT_S = 5.0
"""A process without a heartbeat for so long has stalled."""
INDICES = (INDEX, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
"""Variables that hold the index of a process, by launcher."""
POLL_S = 0.1
GRACE_S = 5.0
"""Seconds for the other processes to end by themselves after one has failed."""
STDERR_LINES = 30
"""Lines of a failed process's stderr that are shown."""


def is_first_process() -> bool:
    """Whether this process is the first of its run. Works before JAX is imported."""
    return all(os.environ.get(name, "0") == "0" for name in INDICES)


def start_heartbeat() -> None:
    """Starts a thread that shows the launcher that this process runs, if there is a launcher."""
    folder = os.environ.get(BEATS)
    if folder is None:
        return
    file = Path(folder) / os.environ[INDEX]

    def beat() -> None:
        while file.parent.is_dir():
            file.touch()
            time.sleep(BEAT_S)

    file.touch()
    threading.Thread(target=beat, daemon=True).start()


class Processes:
    """The processes of a run on this machine, started and watched until all have ended."""

    def __init__(self, command: Sequence[str], count: int, environment: dict[str, str]):
        address = f"127.0.0.1:{_free_port()}"
        self._beats = tempfile.TemporaryDirectory(prefix="launch_")
        self._stderr_tails: list[deque[str]] = [deque(maxlen=STDERR_LINES) for _ in range(count)]
        self._all: list[subprocess.Popen[str]] = []
        self._stderr_readers: list[threading.Thread] = []
        for index in range(count):
            own = {COORDINATOR: address, COUNT: str(count), INDEX: str(index)}
            own[BEATS] = self._beats.name
            is_first = index == 0
            process = subprocess.Popen(
                [sys.executable, *command],
                env={**environment, **own},
                stdout=None if is_first else subprocess.DEVNULL,
                stderr=None if is_first else subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches only the launcher
            )
            self._all.append(process)
            if not is_first:
                self._stderr_readers.append(
                    threading.Thread(target=self._read_stderr, args=(index,))
                )
                self._stderr_readers[-1].start()
        self._interrupts = 0

    def _read_stderr(self, index: int) -> None:
        stream = self._all[index].stderr
        assert stream is not None
        with stream:
            self._stderr_tails[index].extend(stream)

    def ask_to_stop(self, number: int, _frame: object = None) -> None:
        """Sends SIGTERM to one process, which notifies the others; a second Ctrl-C kills all."""
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            return self.end()
        if self._all[0].poll() is None:
            self._all[0].send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kills those that still run, and waits until they are gone."""
        for process in self._all:
            if process.poll() is None:
                process.kill()
        for process in self._all:
            process.wait()
        for reader in self._stderr_readers:
            reader.join()
        self._beats.cleanup()

    def wait(self) -> int:
        """Returns the run's exit code: 0, or that of the first process that failed.

        A run that was stopped before its end has saved, and ends with 75; nothing has failed.
        """
        while True:
            codes = [process.poll() for process in self._all]
            failed = {i: code for i, code in enumerate(codes) if code and code != UNFINISHED}
            if failed:
                return self._end_after(min(failed, key=lambda i: _is_consequence(failed[i])))
            if all(code is not None for code in codes):
                self.end()
                return UNFINISHED if UNFINISHED in codes else 0
            time.sleep(POLL_S)

    def _end_after(self, failed: int) -> int:
        code = self._all[failed].returncode
        stalled = self._stalled()
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(p.poll() is None for p in self._all):
            time.sleep(POLL_S)
        is_printed = self._all[0].returncode == code
        if not is_printed or code < 0:
            lines = "".join(f"[process {failed}] {line}" for line in self._stderr_tails[failed])
            sys.stderr.write(lines)
            cause = f"process {failed} of {len(self._all)} {_describe_exit(code)}"
            if stalled is not None:
                index, silent_s = stalled
                cause = (
                    f"process {index} of {len(self._all)} (pid {self._all[index].pid}) stalled: no "
                    f"sign of life for {silent_s:.0f} s, so process {failed} {_describe_exit(code)}"
                )
            print(
                f"launch: {cause}; the others are ended, and the same command resumes what "
                "is saved",
                file=sys.stderr,
            )
        self.end()
        return code if code > 0 else 128 - code

    def _stalled(self) -> tuple[int, float] | None:
        """Of the processes that have not ended, the longest silent one and its seconds, if any."""
        now, silent = time.time(), []
        for index, process in enumerate(self._all):
            file = Path(self._beats.name) / str(index)
            if process.poll() is None and file.exists():
                silent.append((now - file.stat().st_mtime, index))
        silent_s, index = max(silent, default=(0.0, 0))
        return (index, silent_s) if silent_s > SILENT_S else None


def _is_consequence(code: int) -> tuple[bool, bool]:
    """Sort key: the process that failed first, before those that JAX aborted because of it."""
    return code > 0, code == -signal.SIGABRT


def _describe_exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str]) -> int:
    """Reads the command line, starts, and waits."""
    parser = argparse.ArgumentParser(prog="python -m speechlm2_jax.launch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-n", "--processes", type=int, required=True)
    parser.add_argument("--cpu-devices", type=int, metavar="N", help="devices of each, on CPU")
    parser.add_argument(
        "--heartbeat",
        type=int,
        metavar="SECONDS",
        help="a process without heartbeat for so long counts as dead",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="train.py and its arguments")
    options = parser.parse_args(argv)
    if options.processes < 1 or not options.command:
        parser.error("give the number of processes (-n) and a command: train.py --config NAME")
    environment = dict(os.environ)
    if options.cpu_devices:
        flag = f"--xla_force_host_platform_device_count={options.cpu_devices}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
    if options.heartbeat:
        environment[HEARTBEAT] = str(options.heartbeat)
    processes = Processes(options.command, options.processes, environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, processes.ask_to_stop)
    return processes.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
