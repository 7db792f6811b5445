"""Times data sets of any size: the index of a manifest, the first batch, planning, resuming.

    python -m benchmarks.data_scale
    python -m benchmarks.data_scale --rows 100000 --synthetic-rows 0
    python -m benchmarks.data_scale --prompt-format qwen --tokenizer DIR

It makes its rows itself: segments of one recording, whose durations are log-normal (median 8 s,
sigma 0.8, 0.5 to 40 s), with texts of 2.5 words a second. The synthetic index has the rows of a
small manifest again and again, so that each can be read. Memory is RssAnon, which leaves out mapped
files; every measurement is that of a process of its own, after its imports.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing

RATE_HZ, LONGEST_S = 16_000, 40.0
TILED_ROWS = 1 << 16
"""Lines of the manifest whose index is repeated."""
BUCKETS, BATCH_TOKENS = 20, 8000
WORDS = "the of and to in is you that it he was for on are as with his they at be this".split()
_BLOCK_ROWS = 1 << 20


def main() -> None:
    """Measures, and prints the table and the line of JSON."""
    arguments = _arguments()
    if arguments.stage is not None:
        print(json.dumps(STAGES[arguments.stage](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _write_recording(folder / "long.wav")
        manifests: dict[str, int] = {}
        if arguments.rows:
            _write_manifest(folder / "rows.jsonl", arguments.rows)
            manifests["rows"] = arguments.rows
        if arguments.synthetic_rows:
            _write_manifest(folder / "synthetic.jsonl", min(TILED_ROWS, arguments.synthetic_rows))
            manifests["synthetic"] = arguments.synthetic_rows
        result: dict[str, Any] = {}
        for manifest, rows in manifests.items():
            result[f"{manifest}_rows"] = rows
            stages = ("index", "start", "again", "plan", "hosts")
            if manifest == "synthetic":
                stages = ("index", "tile", *stages[1:])
            for stage in stages:
                timing.log(f"{rows:,} rows: {stage} ...")
                found = _stage(stage, folder / f"{manifest}.jsonl", rows, arguments)
                result |= {f"{manifest}_{stage}_{key}": value for key, value in found.items()}
    result |= {"arguments": vars(arguments) | {"folder": None}, "machine": timing.machine()}
    shown = [{"what": k, "value": v} for k, v in result.items() if isinstance(v, int | float)]
    timing.report(shown, result)


def _stage(stage: str, manifest: Path, rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one stage measures, in a process of its own."""
    names = ("tokenizer", "prompt_format", "hosts", "batches", "windows")
    options = [f"--{n.replace('_', '-')}={getattr(arguments, n)}" for n in names]
    command = [sys.executable, "-m", "benchmarks.data_scale", f"--stage={stage}", *options]
    command += [f"--manifest={manifest}", f"--rows={rows}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _index(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds the index of the manifest."""
    module, before = _imported(arguments)
    built_s, _ = timing.timed(module)
    spent = os.times()
    folder = Path(f"{arguments.manifest}.index")
    size = sum(path.stat().st_size for path in folder.rglob("*.npy"))
    lines = min(arguments.rows, TILED_ROWS) if "synthetic" in arguments.manifest else arguments.rows
    return {
        "s": built_s,
        "processor_s": sum(spent[:4]),
        "bytes_per_row": size / lines,
        "rss_anon_mb": _rss_anon_mb() - before,
    }


def _start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Opens the index, plans, and reads the first batch."""
    module, before = _imported(arguments)
    begin = time.perf_counter()
    data = module()
    opened_s = time.perf_counter() - begin
    data.setup(frame_count=_frames)
    planned_s = time.perf_counter() - begin
    stream = data.train_batches()
    next(stream)
    first_s = time.perf_counter() - begin
    stream.close()
    return {
        "open_s": opened_s,
        "setup_s": planned_s - opened_s,
        "first_batch_s": first_s,
        "rss_anon_mb": _rss_anon_mb() - before,
    }


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows planned a second, seconds to resume, and padding of audio."""
    from speechlm2_jax.data.index.planned_windows import PlannedWindows

    module, before = _imported(arguments)
    data = module()
    data.setup(frame_count=_frames)
    sampler: Any = data._prepared["train_ds"].sampler
    windows = min(arguments.windows, sampler.order.windows)
    begin, rows, carried = time.perf_counter(), 0, sampler.nothing
    for number in range(windows):
        plan = sampler.window(0, number, carried)
        carried, rows = plan.carried, rows + sum(len(g) for b in plan for g in b.groups)
    rows_per_s = rows / (time.perf_counter() - begin)
    random, resumed = np.random.default_rng(0), list[float]()
    for _ in range(3):
        number = int(random.integers(sampler.order.windows))
        state: dict[str, Any] = {
            "epoch": int(random.integers(5)),
            "window": number,
            "position": 100,
        }
        if number:
            state["left"] = [1] * len(sampler.plan.buckets)
        plans = PlannedWindows(sampler)
        begin = time.perf_counter()
        plans.set_state(state)
        next(plans)
        resumed.append(time.perf_counter() - begin)
    return {
        "rows_per_s": rows_per_s,
        "resume_s": max(resumed),
        "padding": _padding(data),
        "rss_anon_mb": _rss_anon_mb() - before,
    }


def _hosts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches of many hosts: the plan of each, and how often rows come."""
    from speechlm2_jax.data.index.planned_windows import PlannedWindows

    module, _ = _imported(arguments)
    data = module()
    data.setup(frame_count=_frames)
    sampler: Any = replace(data._prepared["train_ds"].sampler, groups=arguments.hosts)
    plans, rows, epochs = set[str](), list[int](), 0
    begin = time.perf_counter()
    for host in range(arguments.hosts):
        iterator, checksum = PlannedWindows(replace(sampler)), hashlib.sha256()
        for plan in islice(iterator, arguments.batches):
            checksum.update(repr(plan).encode())
            if host == 0 and iterator.get_state()["epoch"] == 0:
                rows += [row for group in plan.groups for row in group]
        plans.add(checksum.hexdigest())
        epochs = iterator.get_state()["epoch"]
    return {
        "count": arguments.hosts,
        "plans": len(plans),
        "rows": len(rows),
        "repeated_rows": len(rows) - len(set(rows)),
        "epochs": epochs,
        "s_per_host": (time.perf_counter() - begin) / arguments.hosts,
    }


def _tile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the synthetic index: that of the manifest, repeated."""
    from speechlm2_jax.data.index.storage import (
        ColumnWriter,
        new_folder,
        open_columns,
        read_meta,
        write_meta,
    )

    begin, size = time.perf_counter(), 0
    for folder in Path(f"{arguments.manifest}.index").iterdir():
        meta = read_meta(folder) if folder.is_dir() else None
        if meta is None or folder.name.startswith("plan"):
            continue
        columns, written = open_columns(folder, meta), dict[str, Any]()
        with new_folder(folder) as new:
            for name, column in columns.items():
                writer = ColumnWriter(new / f"{name}.npy", column.dtype)
                for block in _tiles(column, arguments.rows if len(column) else 0):
                    writer.append(block)
                    size += block.nbytes
                written[name] = writer.finish()
            write_meta(new, {**meta, "columns": written})
    return {"s": time.perf_counter() - begin, "gb": size / 1e9}


def _tiles(column: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    repeated = np.tile(column, max(_BLOCK_ROWS // max(len(column), 1), 1))
    for start in range(0, rows, max(len(repeated), 1)):
        yield repeated[: rows - start]


STAGES = {
    "index": _index,
    "start": _start,
    "again": _start,
    "plan": _plan,
    "hosts": _hosts,
    "tile": _tile,
}


def _imported(arguments: argparse.Namespace) -> tuple[Any, float]:
    """What makes the data, with everything imported; and the memory until then."""
    import grain  # noqa: F401
    import soundfile  # noqa: F401

    from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer, loader  # noqa: F401

    tokenizer = Tokenizer(arguments.tokenizer)
    tokenizer.add_special_tokens(["<|audioplaceholder|>"])
    dataset = SALMDataset(tokenizer)
    train = {
        "input_cfg": [{"type": "nemo", "manifest_filepath": arguments.manifest}],
        "prompt_format": arguments.prompt_format,
        "token_equivalent_duration": 0.08,
        "batch_tokens": BATCH_TOKENS,
        "use_multimodal_sampling": True,
        "use_bucketing": True,
        "num_buckets": BUCKETS,
        "shuffle": True,
        "seed": 1,
        "num_workers": 2,
    }
    return lambda: DataModule({"train_ds": train}, tokenizer, dataset), _rss_anon_mb()


def _padding(data: Any) -> float:
    """Audio that full rows have beyond their recordings, as a part of what they hold.

    Of the first 1,048,576 rows.
    """
    prepared = data._prepared["train_ds"]
    contents, plan = prepared.contents, prepared.sampler.plan
    duration_s = contents.parts[0].columns["duration_s"]
    held = real = 0.0
    bucket_of = np.asarray(plan.bucket_of[:_BLOCK_ROWS])
    for number, bucket in enumerate(plan.buckets):
        rows = np.flatnonzero(bucket_of == number)
        held += len(rows) * bucket.shape.samples
        real += float(duration_s[rows if contents.row is None else contents.row[rows]].sum())
    return 1 - real * RATE_HZ / held


def _frames(samples: int) -> int:
    return -(-samples // 1280)


def _rss_anon_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1.024e-3


def _write_recording(path: Path) -> None:
    import soundfile

    wave = np.random.default_rng(0).uniform(-0.1, 0.1, int((LONGEST_S + 1) * RATE_HZ))
    soundfile.write(path, wave, RATE_HZ)


def _write_manifest(path: Path, rows: int) -> None:
    random = np.random.default_rng(0)
    words = np.asarray(WORDS)
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            durations = np.clip(random.lognormal(np.log(8), 0.8, count), 0.5, LONGEST_S).round(2)
            for n, duration in enumerate(durations.tolist()):
                text = " ".join(words[random.integers(0, len(words), round(2.5 * duration) + 1)])
                row = {
                    "id": f"row{start + n}",
                    "audio_filepath": "long.wav",
                    "offset": 0.0,
                    "duration": duration,
                    "sampling_rate": RATE_HZ,
                    "text": text,
                }
                file.write(json.dumps(row) + "\n")


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the manifest")
    parser.add_argument("--synthetic-rows", type=int, default=100_000_000)
    parser.add_argument("--tokenizer", default="configs/parts/tiny_llm")
    parser.add_argument("--prompt-format", default="auto")
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--batches", type=int, default=1000, help="of each host")
    parser.add_argument("--windows", type=int, default=4, help="planned to time planning")
    parser.add_argument("--folder", default=None, help="where files are made; a temporary one")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--manifest", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
