"""Memory and start time of large data of each type: from an index, and from a list in memory.

    python -m benchmarks.data_kinds
    python -m benchmarks.data_kinds --rows 50000 --kinds duplex parquet

It makes its rows itself: recordings of silence of 0.5 to 5 s with texts of 2.5 words a second.
Every measurement is that of a process of its own, after its imports. Memory is RssAnon, which
leaves out mapped files. `processor_s` is the processor time of a start, with that of its children:
what other programs do not lengthen.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.data_scale import RATE_HZ, WORDS, _frames, _rss_anon_mb

STAGES = ("index", "again", "memory")
"""The first start, which builds the index; a later one; and one without an index."""
TARS, GROUP_ROWS = 8, 1000
AGENT_HZ = 22_050
Row = tuple[int, float, str]
"""Its number, seconds, and text."""


def main() -> None:
    """Measures, and prints the table and the line of JSON."""
    arguments = _arguments()
    if arguments.stage is not None:
        print(json.dumps(_start(arguments)))
        return
    result: dict[str, Any] = {"rows": arguments.rows}
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            timing.log(f"{kind}: writing {arguments.rows:,} rows ...")
            entry = KINDS[kind](Path(name), arguments.rows)
            for stage in arguments.stages:
                found = _stage(stage, kind, entry, arguments)
                timing.log(f"{kind}: {stage}: {found}")
                result |= {f"{kind}_{stage}_{key}": value for key, value in found.items()}
            result[f"{kind}_index_bytes_per_row"] = _index_bytes(Path(name)) / arguments.rows
    result |= {"arguments": vars(arguments) | {"folder": None}, "machine": timing.machine()}
    shown = [{"what": k, "value": v} for k, v in result.items() if isinstance(v, int | float)]
    timing.report(shown, result)


def _stage(
    stage: str, kind: str, entry: Mapping[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What one stage measures, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_kinds", f"--stage={stage}"]
    command += [f"--kinds={kind}", f"--entry={json.dumps(entry)}", f"--rows={arguments.rows}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Opens the data, plans, and reads the first batch."""
    import grain  # noqa: F401
    import soundfile  # noqa: F401

    from speechlm2_jax.data import loader  # noqa: F401
    from speechlm2_jax.data.index import row_count

    (kind,) = arguments.kinds
    if arguments.stage == "memory":
        row_count.LARGE_ROWS = arguments.rows * 2
    module = (_duplex_module if kind.startswith("duplex") else _salm_module)(
        json.loads(arguments.entry)
    )
    before, begin, spent = _rss_anon_mb(), time.perf_counter(), sum(os.times()[:4])
    data = module()
    opened_s = time.perf_counter() - begin
    data.setup(frame_count=_frames)
    stream = data.train_batches()
    assert next(stream).ids
    seconds = time.perf_counter() - begin
    stream.close()
    return {
        "open_s": opened_s,
        "first_batch_s": seconds,
        "processor_s": sum(os.times()[:4]) - spent,
        "rss_anon_mb": _rss_anon_mb() - before,
    }


_COMMON = {"use_bucketing": True, "num_buckets": 10, "shuffle": True, "seed": 1, "num_workers": 2}


def _salm_module(entry: dict[str, Any]) -> Callable[[], Any]:
    from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer

    tokenizer = Tokenizer("configs/parts/tiny_llm")
    tokenizer.add_special_tokens(["<|audioplaceholder|>"])
    train = {
        "input_cfg": [entry],
        "token_equivalent_duration": 0.08,
        "batch_tokens": 2000,
        "use_multimodal_sampling": True,
        **_COMMON,
    }
    dataset = SALMDataset(tokenizer)
    return lambda: DataModule({"train_ds": train}, tokenizer, dataset)


def _duplex_module(entry: dict[str, Any]) -> Callable[[], Any]:
    import lhotse  # noqa: F401

    from speechlm2_jax.data import DataModule, DuplexS2SDataset, Tokenizer

    tokenizer = Tokenizer("configs/parts/tiny_llm")
    keys = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        tokenizer.add_special_tokens(keys)
    rates = {"source_sample_rate": RATE_HZ, "target_sample_rate": AGENT_HZ}
    train = {"input_cfg": [entry], "batch_duration": 40.0, **_COMMON}
    data = {"frame_length": 0.08, **rates, "train_ds": train}
    dataset = DuplexS2SDataset.from_config(data, tokenizer)
    return lambda: DataModule(data, tokenizer, dataset)


def _rows(count: int) -> Iterator[Row]:
    random, words = np.random.default_rng(0), np.asarray(WORDS)
    lengths = np.clip(random.lognormal(np.log(2), 0.8, count), 0.5, 5.0).round(2).tolist()
    for number, seconds in enumerate(lengths):
        chosen = random.integers(0, len(words), round(2.5 * seconds) + 1)
        yield number, seconds, " ".join(words[chosen])


def _clip(seconds: float, rate_hz: int) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(round(seconds * rate_hz)), rate_hz, format="FLAC")
    return buffer.getvalue()


def _clips(rate_hz: int = RATE_HZ) -> Callable[[float], bytes]:
    """A recording that lasts so long, made once for each length."""
    made: dict[float, bytes] = {}

    def clip(seconds: float) -> bytes:
        if seconds not in made:
            made[seconds] = _clip(seconds, rate_hz)
        return made[seconds]

    return clip


def _write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with open(path, "wb") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        file.write(b"\0" * 2 * tarfile.BLOCKSIZE)


def _parts(count: int) -> Iterator[tuple[int, list[Row]]]:
    rows = list(_rows(count))
    for part in range(TARS):
        yield part, rows[part * count // TARS : (part + 1) * count // TARS]


def _recording(name: str, seconds: float, rate_hz: int, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": name,
        "sources": [{"channels": [0], **source}],
        "sampling_rate": rate_hz,
        "num_samples": round(seconds * rate_hz),
        "duration": round(seconds * rate_hz) / rate_hz,
        "channel_ids": [0],
    }


def _cut(row: Row, user: dict[str, Any], agent: dict[str, Any], seconds: float) -> dict[str, Any]:
    number, lasts_s, text = row
    turns = [("user", 0.0, "hello"), ("agent", lasts_s / 2, text)]
    return {
        "id": f"row{number}",
        "start": 0.0,
        "duration": lasts_s,
        "channel": 0,
        "supervisions": [
            {
                "id": f"row{number}-{who}",
                "recording_id": f"row{number}",
                "start": start,
                "duration": lasts_s / 2,
                "channel": 0,
                "text": words,
                "speaker": who,
            }
            for who, start, words in turns
        ],
        "recording": _recording(f"row{number}", seconds, RATE_HZ, user),
        "custom": {"target_audio": _recording(f"row{number}", seconds, AGENT_HZ, agent)},
        "type": "MonoCut",
    }


def _duplex(folder: Path, count: int) -> dict[str, Any]:
    """Cuts of two long files."""
    for name, rate_hz in (("user", RATE_HZ), ("agent", AGENT_HZ)):
        (folder / f"{name}.flac").write_bytes(_clip(6.0, rate_hz))
    user, agent = ({"type": "file", "source": f"{folder}/{n}.flac"} for n in ("user", "agent"))
    with open(folder / "cuts.jsonl", "w") as file:
        for row in _rows(count):
            file.write(json.dumps(_cut(row, user, agent, 6.0)) + "\n")
    return {"type": "lhotse", "cuts_path": f"{folder}/cuts.jsonl"}


def _duplex_shar(folder: Path, count: int) -> dict[str, Any]:
    """SHAR with a tar for each voice."""
    packed, user, agent = {"type": "shar", "source": ""}, _clips(), _clips(AGENT_HZ)
    for part, rows in _parts(count):
        with open(folder / f"cuts.{part:06d}.jsonl", "w") as file:
            for row in rows:
                file.write(json.dumps(_cut(row, packed, packed, row[1])) + "\n")
        members = ((f"row{n}.flac", user(seconds)) for n, seconds, _ in rows)
        _write_tar(folder / f"recording.{part:06d}.tar", members)
        members = ((f"row{n}.flac", agent(seconds)) for n, seconds, _ in rows)
        _write_tar(folder / f"target_audio.{part:06d}.tar", members)
    return {"type": "lhotse_shar", "shar_path": str(folder)}


def _one_manifest(folder: Path, count: int) -> dict[str, Any]:
    """NeMo's tarred data with one manifest for all tars."""
    clip = _clips()
    with open(folder / "manifest.jsonl", "w") as file:
        for part, rows in _parts(count):
            for number, seconds, text in rows:
                row = {"audio_filepath": f"{number}.flac", "duration": seconds, "text": text}
                own = {"shard_id": part, "sampling_rate": RATE_HZ}
                file.write(json.dumps({**row, **own}) + "\n")
            members = ((f"{number}.flac", clip(seconds)) for number, seconds, _ in rows)
            _write_tar(folder / f"audio_{part}.tar", members)
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{folder}/manifest.jsonl",
        "tarred_audio_filepaths": f"{folder}/audio__OP_0..{TARS - 1}_CL_.tar",
    }


def _parquet(folder: Path, count: int) -> dict[str, Any]:
    """Files of row groups, with recordings and their seconds."""
    import pyarrow
    from pyarrow import parquet

    clip = _clips()
    for part, rows in _parts(count):
        numbers, seconds, texts = zip(*rows, strict=True)
        audio = [{"bytes": clip(one), "path": None} for one in seconds]
        columns = {"audio": audio, "id": numbers, "duration": seconds, "text": texts}
        path = folder / f"train-{part:05d}.parquet"
        parquet.write_table(pyarrow.table(columns), path, row_group_size=GROUP_ROWS)
    return {"type": "parquet", "manifest_filepath": str(folder)}


def _txt_pair(folder: Path, count: int) -> dict[str, Any]:
    """Two texts, and questions."""
    with open(folder / "source.txt", "w") as source, open(folder / "target.txt", "w") as target:
        for number, _, text in _rows(count):
            source.write(f"{number} {text}\n")
            target.write(f"{text}\n")
    (folder / "questions.txt").write_text("What is it?\nWhat is this about?\n")
    names = ("source_paths", "target_paths", "questions_path")
    files = (f"{folder}/{name}.txt" for name in ("source", "target", "questions"))
    return {"type": "txt_pair", **dict(zip(names, files, strict=True))}


def _webdataset(folder: Path, count: int) -> dict[str, Any]:
    """Tars of JSON and recordings."""
    clip = _clips()
    for part, rows in _parts(count):
        members = (
            member
            for number, seconds, text in rows
            for member in (
                (f"{number}.json", json.dumps({"conversations": _turns(text)}).encode()),
                (f"{number}.flac", clip(seconds)),
            )
        )
        _write_tar(folder / f"{part}.tar", members)
    return {"type": "share_gpt_webdataset", "data_dir": str(folder)}


def _turns(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<sound>\nwhat?"}, {"from": "gpt", "value": text}]


def _index_bytes(folder: Path) -> int:
    found = folder.rglob("*.index/[!p]*/*.npy"), folder.rglob("*.index/prompts-*/*.npy")
    return sum(path.stat().st_size for paths in found for path in paths)


KINDS: Mapping[str, Callable[[Path, int], dict[str, Any]]] = {
    "duplex": _duplex,
    "duplex_shar": _duplex_shar,
    "one_manifest": _one_manifest,
    "parquet": _parquet,
    "txt_pair": _txt_pair,
    "webdataset": _webdataset,
}


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--folder", default=None, help="where files are made; a temporary one")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--entry", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
