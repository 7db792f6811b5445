"""Times fresh processes: the import, the first response and the first training step.

    python -m benchmarks.startup --config salm --rounds 3

Each is a process of its own, started with an empty cache of compiled programs (cold) and then with
what the first has left there (warm). The response is to one second of noise, with the pretrained
components of the config; its time is from the start of the process. Needs everything that train.py
needs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing

DONE = "done"
IMPORT = f"import speechlm2_jax as slm; slm.models.SALM; print('{DONE}', flush=True)"
RESPONSE = f"""
import sys

import numpy as np

from speechlm2_jax.experiment import make_model
from speechlm2_jax.settings import find, load
from speechlm2_jax.compilation_cache import keep_compiled_programs

keep_compiled_programs("auto")
config = sys.argv[1]
model = make_model(load(config)["model"], near=(find(config).resolve().parent,)).eval()
dialog = [{{"role": "user", "content": "Write this down: " + model.audio_locator_tag}}]
noise = np.random.default_rng(0).normal(0.0, 0.1, (1, model.sampling_rate)).astype(np.float32)
model.generate([dialog], noise, np.array([noise.shape[1]]), max_new_tokens=16)
print("{DONE}", flush=True)
"""


def main() -> None:
    """Starts the processes one after the other; prints the table and the line of JSON."""
    arguments = _arguments()
    result: dict[str, Any] = {**vars(arguments), "machine": timing.machine()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, (command, awaited) in _processes(arguments.config, Path(folder)).items():
            timing.log(f"{what}: cold, then {arguments.rounds} times warm ...")
            name = what.replace(" ", "_")
            cache = Path(folder) / name
            times = [_seconds(command, awaited, cache) for _ in range(arguments.rounds + 1)]
            cold_s, warm_s = times[0], times[1:]
            warm = [statistics.median(warm_s), min(warm_s), max(warm_s)]
            result |= {f"{name}_cold_s": cold_s, f"{name}_warm_s": warm}
            spread = "{:.1f} ({:.1f} to {:.1f})".format(*warm)
            rows.append({"what": what, "cold, s": cold_s, "warm, s": spread})
    timing.report(rows, result)


def _processes(config: str, folder: Path) -> dict[str, tuple[Sequence[str], str]]:
    """By what they show: the command, and how the line begins that ends the time."""
    train = Path(__file__).resolve().parent.parent / "train.py"
    run = f"++exp_manager.explicit_log_dir={folder / 'run'}"
    fresh = "++exp_manager.resume_if_exists=false"
    return {
        "import": ([sys.executable, "-c", IMPORT], DONE),
        "first response": ([sys.executable, "-c", RESPONSE, config], DONE),
        "first training step": (
            [sys.executable, str(train), "--config", config, run, fresh],
            "step 1/",
        ),
    }


def _seconds(command: Sequence[str], awaited: str, cache: Path) -> float:
    """Seconds until a process prints the awaited line; it is stopped then.

    Raises SystemExit with its output if it ends before.
    """
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    output = []
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(awaited):
                taken_s = time.perf_counter() - start
                process.kill()
                return taken_s
            output.append(line)
    raise SystemExit(f"a process ended early:\n{''.join(output)}")


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--config", default="salm")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
