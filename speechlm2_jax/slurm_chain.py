"""Submits a training job to SLURM, again and again, until its run is finished.

    python -m speechlm2_jax.slurm_chain RUN_DIR [sbatch options] job.sh

Each job resumes the run of the one before it (`exp_manager.resume_if_exists=true`). The chain ends
with 0 when `RUN_DIR/FINISHED` exists, with 2 when a job's settings are refused, and with 1 after
`--attempts` jobs in a row that added no checkpoint. It waits beside the job (`sbatch --wait`) and
needs only Python; for a run in an object store also fsspec and the store's package. Started twice,
it waits for its own job: jobs of one name run one at a time (`--dependency=singleton`).
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speechlm2_jax.exit_codes import BAD_INPUT, FAILED, FINISHED, MARKER

OPTIONS = ("--wait", "--parsable", "--dependency=singleton")
INTERRUPTED = 130
_WHOLE = "committed"
"""What an object store holds of the checkpoints that were uploaded whole."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The jobs of one run."""

    run_dir: Path | str
    """The run directory; a text if it is an address of an object store."""
    sbatch: Sequence[str]
    """Arguments of sbatch: options and the job script."""
    attempts: int = 3
    """Jobs in a row without a new checkpoint, after which the chain gives up."""
    pause_s: float = 60.0
    """Seconds to wait after a job without a new checkpoint."""

    def run(self) -> int:
        """Submits jobs until the run is finished. Returns the exit code of the chain."""
        vain = 0
        while not self._is_finished():
            before = self._last_step()
            job, code = self._submit()
            after = self._last_step()
            if self._is_finished():
                break
            _log(f"job {job or '-'} ended with {code}; last checkpoint: step {_shown(after)}")
            if code == BAD_INPUT:
                _log("the settings are refused (see the job's output); no other job is submitted")
                return BAD_INPUT
            vain = 0 if after != before and after is not None else vain + 1
            if vain >= self.attempts:
                _log(f"{vain} jobs in a row added no checkpoint to {self.run_dir}; giving up")
                return FAILED
            if vain:
                time.sleep(self.pause_s)
        _log(f"{self.run_dir} is finished")
        return FINISHED

    def _submit(self) -> tuple[str, int]:
        """Submits one job and waits for its end. Returns its id (empty: refused) and exit code."""
        process = subprocess.Popen(
            ["sbatch", *OPTIONS, *self.sbatch], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            job = process.stdout.readline().strip().partition(";")[0]
            if job:
                _log(f"job {job} is submitted")
            try:
                process.stdout.read()
                return job, process.wait()
            except KeyboardInterrupt:
                _log(f"interrupted; job {job} stays (scancel {job} ends it)")
                process.kill()
                raise

    def _is_finished(self) -> bool:
        if isinstance(self.run_dir, Path):
            return (self.run_dir / MARKER).exists()
        return MARKER in _objects(self.run_dir)

    def _last_step(self) -> int | None:
        """The newest checkpoint of the run; None if there is none."""
        if isinstance(self.run_dir, Path):
            folder = self.run_dir / "checkpoints"
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        else:
            names = _objects(f"{self.run_dir}/{_WHOLE}")
        return max((int(name) for name in names if name.isdigit()), default=None)


def _objects(address: str) -> list[str]:
    """The last parts of the names at an address. Raises ImportError without its package."""
    from fsspec.core import url_to_fs

    files, root = url_to_fs(address)
    files.invalidate_cache()
    try:
        found = files.ls(root, detail=False)
    except FileNotFoundError:
        return []
    return [str(name).rstrip("/").rpartition("/")[2] for name in found]


def _shown(step: int | None) -> str:
    return "none" if step is None else str(step)


def _log(text: str) -> None:
    print(f"slurm_chain: {text}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Reads the command line and runs the chain."""
    parser = argparse.ArgumentParser(
        prog="python -m speechlm2_jax.slurm_chain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--attempts", type=int, default=3, help="jobs in a row without progress")
    parser.add_argument("--pause", type=float, default=60.0, help="seconds after such a job")
    parser.add_argument("run_dir", help="exp_manager.explicit_log_dir of the run")
    parser.add_argument("sbatch", nargs=argparse.REMAINDER, help="sbatch options and job script")
    options = parser.parse_args(argv)
    if not options.sbatch or options.attempts < 1:
        parser.error("give the run directory and the job script; --attempts is at least 1")
    chain = Chain(
        run_dir=options.run_dir if "://" in options.run_dir else Path(options.run_dir),
        sbatch=options.sbatch,
        attempts=options.attempts,
        pause_s=options.pause,
    )
    try:
        return chain.run()
    except ImportError as error:
        _log(f"{options.run_dir}: {error}")
        return BAD_INPUT
    except FileNotFoundError:
        _log("sbatch is not found; start the chain on a login node of the cluster")
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
