"""Processes that read batches: the same data as threads, and nothing left of them at the end."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data import worker_process
from speechlm2_jax.data.frame_counts import CachedFrameCount
from speechlm2_jax.data.index.texts import PlainText
from speechlm2_jax.data.pipeline import Delivered, Workers, pipeline
from speechlm2_jax.data.reading import Reading
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline.small_corpus import assert_same, frames, read_rows, write_manifest

COUNT = 7
NOT_THERE = "clip04"
AUGMENTED = {"perturb_volume": True, "volume_prob": 1.0, "perturb_speed": True}


@pytest.fixture(scope="module")
def manifest(corpus):
    """One recording is missing."""
    rows = read_rows(corpus / "manifest.jsonl")
    for row in rows:
        row["sampling_rate"] = 16000  # so that no header is asked
        if NOT_THERE in row["audio_filepath"]:
            row["audio_filepath"] = f"{NOT_THERE}.flac"
    return write_manifest(corpus / "one_missing.jsonl", rows)


def streamed(module, state=None):
    """The first batches behind a state, and the state after each."""
    stream = module.train_batches(state)
    batches, states = [], []
    for batch in islice(stream, COUNT):
        batches.append(batch)
        states.append(stream.get_state())
    stream.close()
    return batches, states


def test_a_process_gives_what_threads_give_behind_any_state(manifest, make_module, caplog):
    keys = {**AUGMENTED, "groups": 2, "num_workers": 2}
    batches, states = streamed(make_module(manifest, **keys))
    caplog.clear()
    stream = make_module(manifest, **keys, worker_processes=1).train_batches(states[0])
    for batch, state in zip(batches[1:], states[1:], strict=True):
        assert_same(next(stream), batch)
        assert stream.get_state() == state
    assert f"dropped {NOT_THERE}_sp1.1: missing" in caplog.text
    workers = children()
    assert len(workers) == 1
    stream.close()
    assert not any(is_alive(pid) for pid in workers)


@pytest.mark.slow  # each process takes seconds to start
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same(processes, manifest, make_module):
    keys = {**AUGMENTED, "groups": 2}
    expected = streamed(make_module(manifest, **keys))
    found = streamed(make_module(manifest, **keys, worker_processes=processes))
    assert found[1] == expected[1]
    for batch, other in zip(found[0], expected[0], strict=True):
        assert_same(batch, other)


@pytest.mark.slow  # each process takes seconds to start
def test_a_process_that_is_killed_ends_the_run_with_an_error(manifest, make_module):
    stream = make_module(manifest, worker_processes=1).train_batches()
    next(stream)
    (worker,) = children()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="terminated unexpectedly"):
        list(islice(stream, 20))
    stream.close()


@pytest.mark.slow  # each process takes seconds to start
def test_an_error_of_a_process_is_raised_in_the_run():
    workers = Workers(processes=2)
    stream = iter(pipeline(Count, {"epoch": 0, "position": 3}, Spoiled(), workers))
    assert next(stream).batch == 4
    with pytest.raises(SettingsError, match="spoiled: 5"):
        next(stream)
    stream.close()


class Count:
    """Plans that are numbers."""

    def __next__(self):
        self.last += 1
        return self.last

    def get_state(self):
        return {"epoch": 0, "position": self.last}

    def set_state(self, state):
        self.last = state["position"]


class Spoiled:
    """Reads the number 4 only."""

    def load(self, planned, key):
        assert key == (0, planned)
        if planned != 4:
            raise SettingsError(f"spoiled: {planned}")
        return planned, Reading(groups=[], failures=[], read={})


RUN = """
import sys
from tests.data_pipeline.conftest import DATA
from tests.data_pipeline.small_corpus import TAG, frames
from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer

def main():
    tokenizer = Tokenizer(DATA / "llm" / "qwen3")
    tokenizer.add_special_tokens([TAG])
    entry = {"type": "lhotse_as_conversation", "manifest_filepath": sys.argv[1]}
    train = {"input_cfg": [entry], "prompt_format": "qwen", "batch_size": 4}
    train["token_equivalent_duration"] = 0.08
    module = DataModule(
        {"train_ds": {**train, "worker_processes": 2}}, tokenizer, SALMDataset(tokenizer)
    )
    module.setup(frame_count=frames)
    stream = module.train_batches()
    next(stream)
    print("read", flush=True)
    if len(sys.argv) > 2:
        sys.stdin.read()

if __name__ == "__main__":
    main()
"""


def start(tmp_path, *arguments):
    """A program of its own that reads with two processes, once it has read a batch."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "read\n", process.stderr.read()
    return process


@pytest.mark.slow  # each process takes seconds to start
def test_processes_end_with_a_program_that_is_killed(manifest, tmp_path):
    run = start(tmp_path, manifest, "wait")
    workers = children(run.pid)
    assert len(workers) >= 2
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in workers)


@pytest.mark.slow  # each process takes seconds to start
def test_a_program_that_ends_with_its_stream_open_leaves_nothing(manifest, tmp_path):
    run = start(tmp_path, manifest)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0
    assert errors == ""


def test_a_mapped_column_stays_in_its_file(tmp_path):
    column = np.arange(100_000, dtype=np.int32)
    np.save(tmp_path / "column.npy", column)
    mapped = np.asarray(np.load(tmp_path / "column.npy", mmap_mode="r"))
    data = worker_process.dumps({"all": mapped, "part": mapped[30_000:], "own": column[:3]})
    assert len(data) < 1000
    found = worker_process.loads(data)
    np.testing.assert_array_equal(found["all"], column)
    np.testing.assert_array_equal(found["part"], column[30_000:])
    assert isinstance(found["part"].base, np.memmap)
    every_other = worker_process.loads(worker_process.dumps(mapped[::2]))
    np.testing.assert_array_equal(every_other, column[::2])


def test_frames_are_counted_without_the_model(tmp_path):
    counted = CachedFrameCount(lambda samples: 3 + frames(samples))  # cannot be pickled
    assert counted(40_000) == 35
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(counted)
    table = worker_process.loads(worker_process.dumps(counted))
    for samples in (0, 1, 1279, 1280, 1281, 2560, 39_999, 40_000):
        assert table(samples) == 3 + frames(samples)


def test_an_open_manifest_is_opened_anew(tmp_path):
    (tmp_path / "rows.jsonl").write_text("0123456789")
    text = PlainText(tmp_path / "rows.jsonl")
    assert text.read(2, 3) == b"234"
    again = pickle.loads(pickle.dumps(text))
    assert again.read(5, 3) == b"567"
    assert again._file != text._file


def test_a_batch_comes_back_with_its_log(caplog):
    record = logging.LogRecord("speechlm2_jax.x", logging.WARNING, "", 0, "told", (), None)
    worker_process._logged.put(record)
    batch = Delivered(batch=np.arange(5.0), state={"epoch": 1, "position": 2}, read={}, failures=())
    data, arrays = worker_process.packed(batch)
    assert [array.nbytes for array in arrays] == [40]
    found = worker_process.unpacked((data, arrays))
    np.testing.assert_array_equal(found.batch, np.arange(5.0))
    assert found.place == (1, 2)
    assert caplog.messages == ["told"]
    found.batch[0] = 7.0  # not read-only: as batches of threads


def children(parent=None):
    """The processes that Python started for a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            command = (folder / "cmdline").read_text()
        except OSError:
            continue
        is_child = f"\nPPid:\t{parent or os.getpid()}\n" in status
        if is_child and "spawn_main" in command:
            found.append(int(folder.name))
    return found


def is_alive(pid):
    """Whether a process runs: a zombie does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
