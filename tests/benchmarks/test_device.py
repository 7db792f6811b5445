"""The measurement of one device: parts keep to their time and memory, and fail alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device import __main__ as device
from benchmarks.device import turns
from benchmarks.device.parts import MEASURE
from benchmarks.device.plan import FULL, PARTS, TINY, deadlines, generation_gib
from benchmarks.device.rows import Rows, table
from benchmarks.device.salm import generation_work, training

ROOT = Path(__file__).parents[2]
CARDS = {  # GiB of the card: largest training batches at 15 s and 40 s, batch of the comparison
    139: (32, 16, 32),
    80: (32, 16, 8),
    24: (4, 1, None),
}


def rows_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_all_parts_end_within_nine_minutes():
    assert [part.name for part in PARTS] == list(MEASURE)
    *_, (_, last_s) = deadlines(PARTS)
    assert last_s + device.EXIT_S <= 540
    assert set(FULL.trainings) == set(TINY.trainings) == {"training-15s", "training-40s"}
    assert FULL.generation_batches == (1, 32, 192) and FULL.new_tokens == 128


@pytest.fixture
def accelerator(monkeypatch):
    """Computes in bfloat16, as on a GPU."""
    for module in ("salm", "turns"):
        monkeypatch.setattr(f"benchmarks.device.{module}.compute_dtype", lambda: "bfloat16")


@pytest.mark.parametrize("card", CARDS)
def test_a_card_gets_the_largest_batch_that_fits(card, accelerator, monkeypatch, capsys):
    timed = lambda work: {"batch": work.sizes.batch}  # noqa: E731
    monkeypatch.setattr("benchmarks.device.salm._train", lambda plan, work: timed(work))
    rows = Rows("training", 0.92 * card, time.monotonic() + 600)
    for name in FULL.trainings:
        training(name, FULL, rows)
    found = rows_of(capsys)
    largest = tuple(
        next(
            (r["batch"] for r in found if r["status"] == "measured" and seconds in r["what"]), None
        )
        for seconds in ("x 15 s", "x 40 s")
    )
    assert (*largest, turns.common_batch(FULL, rows)) == CARDS[card]
    skipped = [row["reason"] for row in found if row["status"] == "skipped"]
    assert all("GiB, the device has" in reason for reason in skipped)
    assert skipped or card > 80


def test_generation_of_192_rows_needs_a_large_card(accelerator):
    needed = {b: generation_gib(generation_work(FULL, b), 2) for b in FULL.generation_batches}
    assert needed[1] < 8 and needed[32] < 0.92 * 24 and 0.92 * 24 < needed[192] < 0.92 * 80


def test_a_row_that_fails_leaves_the_others(capsys):
    rows = Rows("part", 8.0, time.monotonic() + 60)

    def full():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand a long list")

    assert rows.measure("large", dict, needed_gib=9.0) == "skipped"
    assert rows.measure("long", dict, needed_s=100.0) == "skipped"
    assert rows.measure("full", full) == "out of memory"
    assert rows.measure("broken", lambda: {}["x"]) == "failed"
    assert rows.measure("good", lambda: {"time_s": [2.0, 1.0, 3.0], "mfu": 0.5}) == "measured"
    found = rows_of(capsys)
    assert [row["what"] for row in found] == ["large", "long", "full", "broken", "good"]
    assert found[0]["reason"] == "needs about 9 GiB, the device has 8 GiB"
    text = table(found)
    assert "out of memory: RuntimeError: RESOURCE_EXHAUSTED" in text
    assert "2,000 ms (1,000 to 3,000) | - | 50.0 %" in text


@pytest.mark.parametrize(
    "code, reason",
    [
        ("exit 3", "the process ended with code 3"),
        ("sleep 60", "stopped after its 2 s"),
        ("kill -ABRT $$", "the process ended with code -6"),
    ],
)
def test_a_process_that_fails_keeps_its_first_rows(code, reason, monkeypatch, tmp_path):
    first = json.dumps({"part": "p", "what": "first", "status": "measured", "time_s": [1, 1, 1]})
    command = ["sh", "-c", f"echo '{first}'; {code}"]
    monkeypatch.setattr(device.Run, "_command", lambda self, name, left_s: command)
    with (tmp_path / "log").open("w") as log:
        rows, seconds = device.Run(True, dict(os.environ), log).part("p", 2.0)
    assert [row["status"] for row in rows] == ["measured", "failed"]
    assert rows[1]["reason"] == reason and seconds < 20


def echo(reply):
    code = f"import sys\nfor line in sys.stdin: print('noise'); print('{reply}', flush=True)"
    return turns.Worker([sys.executable, "-c", code])


def test_workers_run_in_turns_and_report_errors():
    good, bad = echo('{"times_s": [2.0]}'), echo('{"error": "no kernel"}')
    try:
        good.send("train 1")
        bad.send("train 1")
        assert good.receive(30) == {"times_s": [2.0]}
        with pytest.raises(RuntimeError, match="no kernel"):
            bad.receive(30)
        with pytest.raises(TimeoutError, match="no result"):
            good.receive(0.1)
    finally:
        good.close()
        bad.close()
    rounds = [{turns.OURS: [1.0, 1.0], "peer": [2.0, 2.0]}, {turns.OURS: [1.0], "peer": [8.0]}]
    assert turns.ratio(rounds, "peer")["ratio"] == pytest.approx(4.0)


def test_without_torch_the_comparison_is_skipped_with_a_note(monkeypatch, capsys):
    monkeypatch.setenv(turns.PEER_PYTHON, sys.executable)
    monkeypatch.setattr(turns, "HAS_PEER", "raise SystemExit('torch not installed')")
    turns.compare(TINY, Rows("pytorch", None, time.monotonic() + 60))
    (row,) = rows_of(capsys)
    assert row["status"] == "skipped" and row["reason"].startswith("torch not installed")


@pytest.mark.slow
def test_tiny_measures_every_part_on_a_cpu(tmp_path):
    asked = [str(ROOT / "benchmarks" / "device.sh"), "--tiny"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "device_results.json").read_text())
    assert list(result["parts"]) == [part.name for part in PARTS]
    assert {row["part"] for row in result["rows"]} == {part.name for part in PARTS}
    for row in result["rows"]:
        assert row["status"] == "measured" or (row["part"], row["status"]) == ("pytorch", "skipped")
        assert row["what"] in done.stdout
        assert row["status"] == "skipped" or (row["time_s"][0] > 0 and row["rate"] > 0)
