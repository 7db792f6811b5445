"""Times the data loader against NeMo's own, and against bare decoding of the same files.

    python -m benchmarks.loader_peer --peer-python NEMO_PYTHON --rounds 2
    python -m benchmarks.loader_peer --speech FOLDER     # without NeMo: against bare decoding

It makes a NeMo manifest of FLAC files at 16 kHz, whose durations are log-normal (median 8 s, sigma
0.8, 0.5 to 40 s): stretches of the recordings below FOLDER one after another, else of a made
signal. All sides take turns (A B A B) on the same cores and read the same number of batches of the
same budget; what counts is seconds of audio per second. Bare decoding is `soundfile.read` in two
threads, of as many files. NeMo runs with 0, 1 and 2 workers.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import side_by_side, timing

RATE_HZ, LONGEST_S = 16_000, 40.0
BATCH_TOKENS, BUCKETS, WARMUP = 4000, 20, 3
TAG = "<|audioplaceholder|>"
PEER = Path(__file__).parent / "peers" / "nemo_loader.py"
WORDS = "the of and to in is you that it he was for on are as with his they at be this".split()


def main() -> None:
    """Measures, and prints the table and the line of JSON."""
    arguments = _arguments()
    if arguments.cores:
        side_by_side.pin(arguments.cores)
    if arguments.stage is not None:
        print(json.dumps(STAGES[arguments.stage](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        settings = Path(name) / "settings.json"
        timing.log(f"making {arguments.files} files ...")
        seconds = _make(Path(name), arguments)
        settings.write_text(json.dumps(_settings(Path(name), arguments)))
        rounds: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            rounds.append({})
            for side, command in _commands(settings, arguments).items():
                rounds[-1][side] = found = side_by_side.run(command)
                timing.log(f"round {number + 1}: {side} {found['audio_s_per_s']:.0f} s/s")
    table = [_row(side, rounds) for side in rounds[0]]
    best = _best_of_peer(rounds)
    result = {
        "arguments": {k: v for k, v in vars(arguments).items() if k not in ("folder", "settings")},
        "audio_s": seconds,
        "rounds": rounds,
        "over_bare": _ratios(rounds, "ours", "bare"),
        "over_peer": best and _ratios(rounds, "ours", best),
        "machine": timing.machine(),
    }
    timing.report(table, result)


def _row(side: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found = [one[side] for one in rounds]
    return {
        "what": side,
        "audio s/s": round(statistics.median(one["audio_s_per_s"] for one in found)),
        "ours over it": " ".join(f"{r:.2f}" for r in _ratios(rounds, "ours", side)),
        "processor s": round(statistics.median(one["processor_s"] for one in found), 2),
        "audio read, s": round(found[0]["audio_s"]),
        "padding": round(found[0].get("padding", 0.0), 3),
    }


def _best_of_peer(rounds: list[dict[str, Any]]) -> str | None:
    speed = {
        side: statistics.median(one[side]["audio_s_per_s"] for one in rounds)
        for side in rounds[0]
        if side.startswith("NeMo")
    }
    return max(speed, key=lambda side: speed[side]) if speed else None


def _ratios(rounds: list[dict[str, Any]], one: str, other: str) -> list[float]:
    """Of each round, and their order: how much more audio one side reads in a second."""
    return [r[one]["audio_s_per_s"] / r[other]["audio_s_per_s"] for r in rounds]


def _commands(settings: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    own = [sys.executable, "-m", "benchmarks.loader_peer", f"--settings={settings}"]
    own += [f"--threads={arguments.threads}", f"--processes={arguments.processes}"]
    commands = {"ours": [*own, "--stage=ours"], "bare": [*own, "--stage=bare"]}
    if arguments.peer_python is not None:
        for workers in arguments.peer_workers:
            command = [arguments.peer_python, str(PEER), str(settings), f"--workers={workers}"]
            commands[f"NeMo, {workers} workers"] = command
    return commands


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reads batches by the loader."""
    from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer

    settings = json.loads(arguments.settings.read_text())
    tokenizer = Tokenizer(settings["tokenizer"])
    tokenizer.add_special_tokens([TAG])
    workers = {"num_workers": arguments.threads, "worker_processes": arguments.processes}
    train = {**settings["train_ds"], **workers}
    data = DataModule({"train_ds": train}, tokenizer, SALMDataset(tokenizer))
    data.setup(frame_count=_frames)
    stream = data.train_batches()
    list(islice(stream, settings["warmup"]))
    begin, used = time.perf_counter(), _processor_s()
    samples = held = rows = 0
    for batch in islice(stream, settings["batches"]):
        samples += int(batch.arrays.audio_lengths.sum())
        held += batch.arrays.audio.size
        rows += len(batch.ids)
    taken_s = time.perf_counter() - begin
    result = {
        "audio_s_per_s": samples / RATE_HZ / taken_s,
        "taken_s": taken_s,
        "processor_s": _processor_s() - used,
        "rows": rows,
        "audio_s": samples / RATE_HZ,
        "padding": 1 - samples / held,
    }
    stream.close()
    return result


def _bare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decodes files in two threads, and does nothing with them."""
    import soundfile

    settings = json.loads(arguments.settings.read_text())
    manifest = Path(settings["manifest"])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    names = [str(manifest.parent / row["audio_filepath"]) for row in rows]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: soundfile.read(name, dtype="float32"), names[:50]))
        begin, used = time.perf_counter(), _processor_s()
        samples = sum(pool.map(lambda name: len(soundfile.read(name, dtype="float32")[0]), names))
        taken_s = time.perf_counter() - begin
    return {
        "audio_s_per_s": samples / RATE_HZ / taken_s,
        "taken_s": taken_s,
        "processor_s": _processor_s() - used,
        "audio_s": samples / RATE_HZ,
    }


STAGES = {"ours": _ours, "bare": _bare}


def _settings(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What all sides read."""
    manifest = str(folder / "manifest.jsonl")
    entry = {
        "type": "lhotse_as_conversation",
        "input_cfg": [{"type": "nemo", "manifest_filepath": manifest}],
        "audio_locator_tag": TAG,
        "tags": {"context": "Transcribe the following:"},
    }
    train: dict[str, Any] = {
        "input_cfg": [entry],
        "prompt_format": "qwen",
        "token_equivalent_duration": 0.08,
        "sample_rate": RATE_HZ,
        "use_multimodal_sampling": True,
        "use_bucketing": True,
        "num_buckets": BUCKETS,
        "batch_tokens": BATCH_TOKENS,
        "shuffle": True,
        "seed": 1,
        "shard_seed": 1,
    }
    tokenizer = str(Path(arguments.tokenizer).resolve())
    return {
        "train_ds": train,
        "tokenizer": tokenizer,
        "manifest": manifest,
        "warmup": WARMUP,
        "batches": arguments.batches,
    }


def _make(folder: Path, arguments: argparse.Namespace) -> float:
    """Writes FLAC files and their manifest; gives the seconds of all."""
    import soundfile

    random, total = np.random.default_rng(0), 0.0
    lengths_s = np.clip(random.lognormal(np.log(8), 0.8, arguments.files), 0.5, LONGEST_S).round(2)
    source = _signal() if arguments.speech is None else _speech(Path(arguments.speech))
    rest = np.zeros(0, np.float32)
    (folder / "audio").mkdir()
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as file:
        for n, duration_s in enumerate(lengths_s.tolist()):
            samples = round(duration_s * RATE_HZ)
            while len(rest) < samples:
                rest = np.concatenate([rest, next(source)])
            wave, rest = rest[:samples], rest[samples:]
            soundfile.write(folder / "audio" / f"{n}.flac", wave, RATE_HZ)
            text = " ".join(random.choice(WORDS, round(2.5 * duration_s) + 1))
            row = {"audio_filepath": f"audio/{n}.flac", "duration": duration_s, "text": text}
            file.write(json.dumps({**row, "sampling_rate": RATE_HZ}) + "\n")
            total += duration_s
    return total


def _speech(folder: Path) -> Iterator[np.ndarray]:
    """The recordings below a folder, again and again."""
    from speechlm2_jax.data.audio import read_audio

    names = sorted(chain.from_iterable(folder.rglob(f"*.{end}") for end in ("flac", "wav")))
    if not names:
        raise SystemExit(f"--speech: no .flac or .wav below {folder}")
    while True:
        for name in names:
            yield read_audio(name, sample_rate_hz=RATE_HZ)


def _signal() -> Iterator[np.ndarray]:
    """Harmonics of a gliding tone with pauses, and noise: compresses about as speech does."""
    random = np.random.default_rng(1)
    while True:
        seconds = np.arange(RATE_HZ * 2) / RATE_HZ
        phase = (
            2 * np.pi * np.cumsum(random.uniform(90, 220) * (1 + 0.1 * np.sin(seconds))) / RATE_HZ
        )
        tone = sum(np.sin(k * phase) / k for k in range(1, 12))
        envelope = np.clip(np.sin(2 * np.pi * random.uniform(1, 3) * seconds), 0, 1)
        wave = 0.1 * envelope * tone + 0.002 * random.standard_normal(len(seconds))
        yield wave.astype(np.float32)


def _frames(samples: int) -> int:
    return -(-samples // 1280)


def _processor_s() -> float:
    return sum(os.times()[:2])


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--peer-python", help="of an environment with NeMo")
    parser.add_argument("--peer-workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--speech", help="recordings that files are made of")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of our loader")
    parser.add_argument("--processes", type=int, default=0, help="of our loader")
    parser.add_argument("--cores", type=int, nargs="+", help="that all run on")
    parser.add_argument("--tokenizer", default="configs/parts/tiny_llm")
    parser.add_argument("--folder", default=None, help="where files are made; a temporary one")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
