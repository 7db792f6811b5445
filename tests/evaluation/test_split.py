"""An evaluation that is split over processes: each input once, whatever dies and resumes."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from speechlm2_jax.evaluation.journal import Journal, session_of
from speechlm2_jax.evaluation.results import Speed
from speechlm2_jax.evaluation.resuming import speed_of
from speechlm2_jax.evaluation.split import ProcessPart
from tests.evaluation.split_case import KINDS, Case

KEYS = [f"key{n}" for n in range(7)]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_input_belongs_to_one_process(count):
    order = [5, 3, 1, 0, 2]
    own = [set(order) - ProcessPart(i, count, "s", ()).of_others(order) for i in range(count)]
    assert sorted(index for part in own for index in part) == sorted(order)
    assert max(map(len, own)) - min(map(len, own)) <= 1


def _row(name, **speed):
    return {"id": name}, {"rtf": 0.1, "speed": speed}


def test_the_first_process_adopts_the_rows_of_all(tmp_path):
    path, settings = tmp_path / "out.jsonl", {"model": "m"}
    first = Journal(path, settings, KEYS)
    first.append({0: _row("a")})
    parts = [tmp_path / f"out.jsonl.part-{n}" for n in range(3)]
    given = ((1, settings), (2, settings), (4, {"model": "other"}))
    for part, (index, used) in zip(parts, given, strict=True):
        with Journal(part, used, KEYS) as one:
            one.read_also(path)
            assert sorted(one.kept) == ([0] if used == settings else [])
            one.start("session")
            assert session_of(part) == "session"
            one.append({index: _row(str(index))})
    with parts[1].open("a") as file:
        file.write('{"id": "cut o')
    first.adopt_parts()
    first.adopt_parts()
    assert {i: kept.row["id"] for i, kept in first.kept.items()} == {1: "1", 2: "2"}
    assert first.note.startswith("2 of 7 responses")
    first.close()
    with Journal(path, settings, KEYS) as again:
        assert {i: kept.row["id"] for i, kept in again.kept.items()} == {0: "a", 1: "1", 2: "2"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl",
        "out.jsonl.part-2.unfinished",
    ]


def test_rows_of_others_are_counted_once(tmp_path):
    files = [tmp_path / f"p{n}" for n in range(3)]
    part = ProcessPart(0, 3, "s", files)
    part.of_others(list(range(7)))
    assert part.done_by_others() == 0, "they have not started"
    files[1].write_text('{"evaluation": {}}\n{"id": 1}\n{"id": 2')
    assert part.done_by_others() == 1
    with files[1].open("a") as file:
        file.write("}\n")
    files[2].write_text('{"evaluation": {}}\n')
    assert [part.done_by_others(), part.done_by_others()] == [1, 0]
    assert ProcessPart(1, 3, "s", files).done_by_others() == 0, "only the first one shows progress"


def test_processes_add_their_audio_and_the_longest_time_counts(tmp_path):
    def kept(part, audio_s, generate_s):
        speed = dict(audio_s=audio_s, generate_s=generate_s, compiled=1)
        return _row("x", **speed)[1] | ({} if part is None else {"part": part})

    journal = Journal(tmp_path / "out.jsonl", {}, KEYS)
    rows = [kept("a/0", 2, 1), kept("a/0", 5, 3), kept("a/1", 4, 4), kept("b/0", 1, 1),
            kept(None, 7, 2), kept(None, 10, 5)]  # fmt: skip
    journal.append({n: ({"id": str(n)}, row) for n, row in enumerate(rows)})
    journal.close()
    with Journal(tmp_path / "out.jsonl", {}, KEYS) as again:
        found = speed_of(again.kept.values())
    assert found == Speed(audio_s=5 + 4 + 1 + 10, generate_s=4 + 1 + 5, compiled=4)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """An evaluation of each kind of model."""
    return Case.make(request.param, tmp_path_factory.mktemp(request.param))


TENSOR = "strategy={_target_: ModelParallelStrategy, tensor_parallel_size: 2}"


@pytest.mark.slow  # each starts processes that compile
@pytest.mark.parametrize(
    ("processes", "devices", "more", "line"),
    [
        (1, 8, [], "8 devices, a copy of the weights on each"),
        (1, 8, [TENSOR], "8 devices, 2 devices share a copy"),
        (1, 8, ["tp_size=2"], "8 devices, 2 devices share a copy"),
        (2, 1, [], "2 processes with 1 devices each, a copy of the weights on each"),
        (4, 1, [], "4 processes with 1 devices each"),
        (2, 1, [TENSOR], "2 devices of 2 processes, 2 devices share a copy"),
    ],
)
def test_any_devices_write_the_rows_of_one(case, tmp_path, processes, devices, more, line):
    more = [*more, *(case.plain_batches if "tp_size=2" in more else ())]
    printed = case.check(tmp_path, processes, *more, devices=devices)
    assert line in printed


@pytest.mark.slow  # two starts of several processes
@pytest.mark.parametrize(
    ("before", "after", "more"), [(4, 2, []), (2, 4, []), (2, 1, []), (2, 2, [TENSOR])]
)
def test_a_killed_process_loses_and_repeats_nothing(case, tmp_path, before, after, more):
    with subprocess.Popen(
        case.command(tmp_path, before, *more),
        cwd=case.folder,
        env=case.environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        # where the processes generate each response together, the first one writes all
        victim = tmp_path / ("out.jsonl" if more else "out.jsonl.part-1")
        while not victim.exists() or victim.read_text().count("\n") < 2:
            assert run.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        os.kill(_pid_of_process(run.pid, 1), signal.SIGKILL)
        assert run.wait(60) == 137
        printed = run.stderr.read()
    assert f"process 1 of {before} was killed by SIGKILL" in printed
    files = [p for p in tmp_path.glob("out.jsonl*") if p.suffix == ".jsonl" or ".part-" in p.name]
    kept = sum(p.read_text().count("\n") - 1 for p in files)
    printed = case.check(tmp_path, after, *more)
    assert f"{kept} of {case.inputs} responses are in {tmp_path / 'out.jsonl'} already" in printed


def _pid_of_process(launcher, index):
    """The process of this index that a launcher started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in map(int, children):
        if f"JAX_PROCESS_ID={index}\0" in Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise AssertionError(f"no process {index}")


@pytest.mark.slow  # starts two processes
def test_several_processes_need_a_manifest(case, tmp_path):
    done = subprocess.run(
        case.command(tmp_path, 2, "output_manifest=null"),
        cwd=case.folder,
        env=case.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "output_manifest: several processes need one" in done.stderr
