"""Damages the run of a tiny model many times, and counts what is silently wrong.

python -m tests.cases.damaged_runs --flips 200     single-bit flips, read by every reader
python -m tests.cases.damaged_runs --kills 40      SIGKILLs, half of them aimed at saves
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

import evaluate
from speechlm2_jax import experiment
from speechlm2_jax.checkpointing import CHECKPOINTS, load_weights
from speechlm2_jax.models import SALM
from speechlm2_jax.training.run import preparation
from speechlm2_jax.training.run.preparation import Setup
from tests.cases.test_damaged_checkpoints import chosen_flips, flip, kind
from tests.training.tiny_salm import write_config

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "training" / "toy.py"
SAVED, RESUMED = 4, 6
"""Steps of the run that is damaged, and to which it is resumed."""
EVERY = 50
"""One flip of so many is trained on to the end, too: the step before must give the same losses."""
PATIENCE_S = 180
FROM_PRETRAINED = SALM.from_pretrained


class TinyRun:
    """A trained run in a folder of its own, its readers, and what they give undamaged."""

    def __init__(self, folder):
        self.folder, self.run, self.started = folder, folder / "run", None
        checkpoints = {"every_n_train_steps": SAVED // 2, "monitor": "val_loss"}
        trainer = {
            "max_steps": SAVED,
            "precision": "32-true",
            "limit_train_batches": SAVED,
            "val_check_interval": SAVED // 2,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "compilation_cache_dir": str(folder / "compiled"),
        }
        self.config = write_config(
            folder, trainer=trainer, exp_manager={"checkpoint_callback_params": checkpoints}
        )
        row = {"audio_filepath": str(folder / "0.wav"), "duration": 0.5, "text": "yes"}
        (folder / "test.jsonl").write_text(json.dumps(row) + "\n")

    def train(self, steps):
        """Trains or resumes in this process; losses by step."""
        words = [f"trainer.max_steps={steps}"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            experiment.build(self.config, words, keep_compiled=True).fit()
        return losses(self.run)

    def restore(self):
        """The whole state that a resumed run starts from."""
        if self.started is None:
            found = experiment.build(self.config, [f"trainer.max_steps={RESUMED}"])
            trainer = found.trainer
            self.started = found.model, Setup.of(found.model, trainer.config, trainer.strategy)
        model, setup = self.started
        restored = preparation.restore(model, setup.layout, self.run / CHECKPOINTS, None, self.run)
        arrays = jax.tree.leaves((restored.arrays, restored.frozen))
        return restored.progress, [np.asarray(array).tobytes() for array in arrays]

    def resume(self):
        """What a resumed run ends with: losses and weights."""
        found = self.train(RESUMED)
        weights = load_weights(self.run, "last").variables
        return found, {path: value.tobytes() for path, value in weights.items()}

    def evaluate(self):
        """The responses that evaluate.py writes, the step that it names, the weights it loaded."""
        loaded = []

        def load(*arguments, **options):
            loaded.append(FROM_PRETRAINED(*arguments, **options))
            return loaded[-1]

        output = self.folder / "answers.jsonl"
        output.unlink(missing_ok=True)
        words = [
            f"pretrained_name={self.run}",
            f"inputs={self.folder / 'test.jsonl'}",
            f"output_manifest={output}",
            "max_new_tokens=8",
            "user_prompt=Say:",
        ]
        with (
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(SALM, "from_pretrained", load),
        ):
            code = evaluate.main([*words, "devices=1"], compiled=str(self.folder / "compiled"))
        assert code == 0
        row, record = map(json.loads, output.read_text().splitlines())
        weights = {path: np.asarray(x).tobytes() for path, x in loaded[0].variables.items()}
        return row["pred_text_raw"], record["provenance"]["model"]["step"], weights


class Lines(logging.Handler):
    """The warnings of one reader."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    @contextlib.contextmanager
    def collected(self):
        """Clears the lines, then collects those that are logged inside."""
        self.lines.clear()
        logger = logging.getLogger("speechlm2_jax")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)


def losses(run):
    """Loss by step, of training."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def flips(count, seed, folder):
    """Flips one bit at a time. Counts outcomes by reader; returns what was silently wrong."""
    run = TinyRun(folder)
    run.train(SAVED)
    kept = folder / "kept"
    shutil.copytree(run.run, kept)
    readers = {
        "resume": run.restore,
        "from_pretrained in evaluate.py": run.evaluate,
        "resume to the end": run.resume,
    }
    expected = {name: read() for name, read in readers.items()}
    older = older_outcomes(run, kept, readers)
    outcomes, silent, kinds, log = collections.Counter(), [], collections.Counter(), Lines()
    for number, (file, bit) in enumerate(chosen_flips(kept / "checkpoints", count, seed)):
        print(f"\r{number} of {count}, {len(silent)} silently wrong", end="", flush=True)
        name = file.relative_to(kept)
        kinds[f"{name.parts[1] if 'frozen' in name.parts else 'step'}: {kind(file)}"] += 1
        for reader, read in readers.items():
            if read == run.resume and number % EVERY:
                continue
            shutil.rmtree(run.run)
            shutil.copytree(kept, run.run)
            flip(run.run / name, bit)
            with log.collected():
                result = read()
            told = [line for line in log.lines if str(run.run / name) in line]
            is_equal = result == expected[reader]
            outcome = (
                f"{'told' if told else 'untold'}, {'equal' if is_equal else 'the step before'}"
            )
            if not is_equal and (not told or result != older[reader]):
                silent.append(f"{reader}: {name} bit {bit}: {log.lines}")
                outcome = "WRONG"
            if len(log.lines) > 1:
                outcome += f", {len(log.lines)} lines"
            outcomes[f"{reader}: {outcome}"] += 1
    print()
    print_counts(f"{count} flips, by kind of file", kinds)
    print_counts("outcomes", outcomes)
    return silent


def older_outcomes(run, kept, readers):
    """What readers give where the newest step is gone."""
    found = {}
    for name, read in readers.items():
        shutil.rmtree(run.run)
        shutil.copytree(kept, run.run)
        shutil.rmtree(run.run / "checkpoints" / str(SAVED))
        found[name] = read()
    return found


def kills(count, seed, folder, steps=2000):
    """Kills a training again and again; returns the steps whose losses are not bit-equal."""
    chance, run = random.Random(seed), folder / "run"
    checkpoints = {"every_n_train_steps": 10, "monitor": None}
    options = {
        "max_steps": steps,
        "limit_train_batches": steps,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "experiment": {"checkpoint_callback_params": checkpoints},
    }
    words = [sys.executable, str(TOY), str(run), json.dumps(options)]
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "TOY_CACHE": str(folder / "compiled"),
    }
    start_one = functools.partial(
        subprocess.Popen, words, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    run_to_end(start_one())
    reference = run.rename(folder / "reference")
    stages = collections.Counter()
    for number in range(count):
        process = start_one()
        aims = number % 2 == 0
        wait_for(run, process, at_save=aims)
        time.sleep(chance.uniform(0, 0.03 if aims else 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = [path.name for path in run.glob("checkpoints/*orbax-checkpoint-tmp*")]
        whole = any("-whole" in name for name in left)
        stage = "while checksums were written" if whole else "while saving" if left else "elsewhere"
        stages[f"{'aimed at a save' if aims else 'at random'}: {stage}"] += 1
    run_to_end(start_one())
    print_counts(f"{count} kills", stages)
    one, other = losses(reference), losses(run)
    print(f"{len(one)} steps, {len(other)} after the kills")
    return [step for step in one | other if one.get(step) != other.get(step)]


def run_to_end(process):
    """Waits for a process that must succeed."""
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:].decode("utf-8", "replace")


def wait_for(run, process, *, at_save):
    """Returns when the process trains, or when it writes a checkpoint."""
    begin, metrics = time.time(), run / "metrics.jsonl"
    before = {path.name for path in run.glob("checkpoints/*")}
    size = metrics.stat().st_size if metrics.exists() else 0
    while time.time() < begin + PATIENCE_S and process.poll() is None:
        if at_save:
            names = {path.name for path in run.glob("checkpoints/[0-9]*tmp*")}
            if names - before:
                return
        elif metrics.exists() and metrics.stat().st_size > size:
            return
        time.sleep(0.0005)
    raise AssertionError(f"it did not train ({process.poll()}): {process.stderr.read()[-500:]}")


def print_counts(title, counts):
    """A small table."""
    print(title)
    for name, count in sorted(counts.items()):
        print(f"  {count:4d}  {name}")


def main(argv):
    """Runs what is asked for; 1 if anything was silently wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cases.damaged_runs",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--flips", type=int, default=0, help="how many bits to flip")
    parser.add_argument("--kills", type=int, default=0, help="how many processes to kill")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for name, count, test in (
            ("flips", arguments.flips, flips),
            ("kills", arguments.kills, kills),
        ):
            if count:
                place = Path(folder) / name
                place.mkdir()
                found = test(count, arguments.seed, place)
                print(f"{name}: {len(found)} of {count} silently wrong", *found[:20], sep="\n  ")
                wrong += found
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
