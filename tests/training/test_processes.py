"""Several processes are one run: the same losses, one writer, one stop, and no orphans."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.checkpointing import load_weights, read_item, step_folders
from speechlm2_jax.exit_codes import UNFINISHED
from speechlm2_jax.launch import COORDINATOR, COUNT, HEARTBEAT, INDEX
from tests.quick_compilation import FLAGS
from tests.training.tiny_salm import SECONDS, write_config

ROOT = Path(__file__).parents[2]
STEPS, FEW = 24, 6
STOPPED_AT = 8
COMPARED = ("loss", "grad_norm", "acc", "val_loss", "val_acc", "val_wer")
NOT_VALIDATED = "+trainer.limit_val_batches=0"  # as in four processes, and half the programs
HEARTBEAT_S = 10
ONE_LENGTH = {"short": 0.5, "long": 0.5}  # one program; four processes have two


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where every run of this file keeps its programs, so that each is compiled once."""
    return tmp_path_factory.mktemp("compiled")


class Run:
    """train.py on some devices, by any number of processes."""

    def __init__(self, folder, compiled, devices, seconds=ONE_LENGTH):
        self.folder, self.compiled, self.devices = folder, compiled, devices
        self.config = write_config(
            folder,
            seconds=seconds,
            trainer={
                "devices": devices,
                "max_steps": STEPS,
                "limit_train_batches": 12,
                "log_every_n_steps": 1,
                "precision": "32-true",
            },
        )

    def environment(self, devices):
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled / str(devices)),
            "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
        }

    def start(self, name, processes=1, *overrides):
        launcher = ["-m", "speechlm2_jax.launch", "-n", str(processes)] if processes > 1 else []
        run_dir = f"exp_manager.explicit_log_dir={self.folder / name}"
        # biases whose gradient is but rounding (in front of a batch norm) stay where they are;
        # with AdamW's own 1e-8 they would walk at full speed, each run on its own way
        eps = "+model.optimizer.eps=1e-3"
        return subprocess.Popen(
            [
                *(sys.executable, *launcher, "train.py", "--config", str(self.config)),
                *(run_dir, eps, *overrides),
            ],
            cwd=ROOT,
            env=self.environment(self.devices // processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process, code=0):
        out, err = process.communicate(timeout=600)
        assert process.returncode == code, err
        assert "launch: " not in err
        return out

    def rows(self, name):
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if "loss" in row or "val_loss" in row]

    def assert_same(self, one, other):
        """The same order of data, the same numbers but for the order of sums over devices."""
        first, second = self.rows(one), self.rows(other)
        assert [row["step"] for row in first] == [row["step"] for row in second]
        for a, b in zip(first, second, strict=True):
            assert set(a) == set(b)
            for name in set(COMPARED) & set(a):
                np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=f"{name} {a}")
        states = [read_item(step_folders(self.folder / n)[0], "progress") for n in (one, other)]
        assert states[0] == states[1]
        weights = [load_weights(self.folder / n, "last").variables for n in (one, other)]
        for path, value in weights[0].items():
            np.testing.assert_allclose(value, weights[1][path], rtol=1e-3, atol=1e-5, err_msg=path)


def wait_for(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(process.stderr.read())


def test_two_processes_are_one_run(tmp_path, compiled):
    run = Run(tmp_path, compiled, devices=2)
    few = f"trainer.max_steps={FEW}"
    out = run.finish(run.start("one", 1, NOT_VALIDATED, few))
    assert "groups of a global batch: 2" in out
    out = run.finish(run.start("two", 2, NOT_VALIDATED, few))
    assert out.count(f"finished {FEW} steps") == 1
    assert "2 processes" in (tmp_path / "two" / "environment.txt").read_text()
    run.assert_same("one", "two")


@pytest.mark.slow  # three processes
def test_two_processes_share_their_validations(tmp_path, compiled):
    run = Run(tmp_path, compiled, devices=2)
    often = ("trainer.limit_train_batches=3", f"trainer.max_steps={FEW}")
    run.finish(run.start("one", 1, *often))
    run.finish(run.start("two", 2, *often))
    assert [row["step"] for row in run.rows("two") if "val_wer" in row] == [3, FEW]
    run.assert_same("one", "two")
    logs = [(tmp_path / name / "train.log").read_text() for name in ("one", "two")]
    texts = [[line for line in log.splitlines() if "hypothesis:" in line] for log in logs]
    assert texts[0] == texts[1] and texts[0]


@pytest.mark.slow  # five processes
def test_two_processes_stop_and_go_on_together(tmp_path, compiled):
    run = Run(tmp_path, compiled, devices=2)
    run.finish(run.start("one", 1, NOT_VALIDATED))
    stopped = run.start("two", 2, NOT_VALIDATED)
    wait_for(stopped, f"step {STOPPED_AT}/")
    stopped.send_signal(signal.SIGTERM)
    out = run.finish(stopped, UNFINISHED)
    assert "a process of the run was told to stop" in out
    assert STOPPED_AT <= len([r for r in run.rows("two") if "loss" in r]) < STEPS

    out = run.finish(run.start("two", 2, NOT_VALIDATED))
    assert out.count("resuming from") == 1 and out.count(f"finished {STEPS} steps") == 1
    run.assert_same("one", "two")


@pytest.mark.slow  # four processes
def test_two_processes_agree_on_what_is_damaged(tmp_path, compiled):
    run = Run(tmp_path, compiled, devices=2)
    words = (
        "+trainer.strategy={_target_: FSDPStrategy}",
        "+exp_manager.checkpoint_callback_params={every_n_train_steps: 3, monitor: null}",
    )
    run.finish(run.start("two", 2, NOT_VALIDATED, *words, f"trainer.max_steps={FEW}"))
    checkpoints = tmp_path / "two" / "checkpoints"
    damaged = []
    for part in (str(FEW), "frozen"):
        files = [path for path in (checkpoints / part).rglob("*") if path.is_file()]
        file = max(files, key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        damaged.append(file)
    out = run.finish(run.start("two", 2, NOT_VALIDATED, *words, f"trainer.max_steps={FEW + 3}"))
    for file in damaged:
        assert out.count(f"{file} has changed since it was written") == 1
    assert f"resuming from {checkpoints / '3'}" in out and f"finished {FEW + 3} steps" in out
    assert (checkpoints / f"unreadable_{FEW}").is_dir()
    assert (checkpoints / "unreadable_frozen").is_dir()
    assert load_weights(tmp_path / "two", "last").step == FEW + 3


@pytest.mark.slow  # five processes, which compile each for itself
def test_four_processes_are_one_run(tmp_path, compiled):
    run = Run(tmp_path, compiled, devices=4, seconds=SECONDS)
    fsdp = "+trainer.strategy={_target_: FSDPStrategy}"
    run.finish(run.start("one", 1, fsdp))
    run.finish(run.start("four", 4, fsdp))
    run.assert_same("one", "four")


def test_a_dead_process_ends_the_run_with_a_message(tmp_path):
    """The launcher knows nothing of what it runs; a real run's end is among the slow ones."""
    script = tmp_path / "wait.py"
    script.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "speechlm2_jax.launch", "-n", "2", str(script)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, "waiting")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was killed by SIGKILL; the others are ended" in err
    for child in children:
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.slow  # waits for the heartbeat limit
def test_without_the_launcher_a_dead_process_ends_the_others_within_the_limit(tmp_path, compiled):
    run = Run(tmp_path, compiled, devices=2)
    processes = []
    for index in range(2):
        own = {COORDINATOR: "127.0.0.1:47123", COUNT: "2", INDEX: str(index)}
        processes.append(
            subprocess.Popen(
                [
                    *(sys.executable, "train.py", "--config", str(run.config)),
                    f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
                    "trainer.max_steps=100000",
                ],
                cwd=ROOT,
                env={**run.environment(1), **own, HEARTBEAT: str(HEARTBEAT_S)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    wait_for(processes[0], "step 2/")
    begin = time.monotonic()
    processes[1].kill()
    out, err = processes[0].communicate(timeout=10 * HEARTBEAT_S)
    took_s = time.monotonic() - begin
    print(took_s, processes[0].returncode, out[-500:], err[-3000:])
    processes[1].communicate()
    assert processes[0].returncode != 0
    assert took_s < 3 * HEARTBEAT_S
    assert "process" in err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.devices=3"], "is not the 2 devices that 2 processes have"),
        pytest.param(["+trainer.num_nodes=3"], "start one per node", marks=pytest.mark.slow),
    ],
)
def test_devices_that_are_not_there_are_refused_once(tmp_path, compiled, overrides, told):
    run = Run(tmp_path, compiled, devices=2)
    process = run.start("two", 2, *overrides)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.count(told) == 1


@pytest.mark.slow  # two processes
def test_processes_join_the_states_of_their_groups(tmp_path):
    """Each process of a stream knows the places of its own groups; a checkpoint has all."""
    script = tmp_path / "join.py"
    script.write_text(
        "import jax\n"
        "from speechlm2_jax.processes import initialize\n"
        "from speechlm2_jax.training.loop import _data_state\n"
        "class Batches:\n"
        "    def get_state(self):\n"
        "        return {'groups': {jax.process_index(): 'ä' * (1 + jax.process_index())}}\n"
        "    def joined_state(self, states):\n"
        "        return {k: v for state in states for k, v in state['groups'].items()}\n"
        "    def __iter__(self): return self\n"
        "    def __next__(self): raise StopIteration\n"
        "initialize()\n"
        "assert _data_state(Batches()) == {'0': 'ä', '1': 'ää'}\n"
        "print('joined', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "speechlm2_jax.launch", "-n", "2", str(script)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "joined" in done.stdout, done.stdout + done.stderr
