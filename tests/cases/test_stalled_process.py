"""A process that stalls is named, not the one that noticed and was aborted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from speechlm2_jax import launch

SCRIPT = """
import os, sys, time
from pathlib import Path
from speechlm2_jax.launch import INDEX, start_heartbeat
start_heartbeat()
folder = Path(sys.argv[1])
(folder / f"started{os.environ[INDEX]}").touch()
while not (folder / "abort").exists():
    time.sleep(0.02)
os.abort()
"""


def test_a_stalled_process_is_named(tmp_path, monkeypatch, capfd):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(launch, "SILENT_S", 2.0)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = launch.Processes([str(script), str(tmp_path)], 2, environment)
    first, second = processes._all
    try:
        while not all((tmp_path / f"started{n}").exists() for n in range(2)):
            time.sleep(0.02)
        second.send_signal(signal.SIGSTOP)
        time.sleep(2.2)
        (tmp_path / "abort").touch()  # what JAX does to the first after the heartbeat limit
        code = processes.wait()
    finally:
        processes.end()
    err = capfd.readouterr().err
    assert code == 128 + signal.SIGABRT
    assert f"process 1 of 2 (pid {second.pid}) stalled: no sign of life for 2 s" in err
    assert "process 0 was killed by SIGABRT" in err
    assert first.returncode == -signal.SIGABRT and second.returncode == -signal.SIGKILL


def test_alone_a_process_does_not_beat(tmp_path):
    code = "from speechlm2_jax import launch; launch.start_heartbeat()"
    environment = {key: value for key, value in os.environ.items() if key != launch.BEATS}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert not list(tmp_path.iterdir())
