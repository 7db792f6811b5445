"""Compares packed rows with buckets of one conversation a row: padding, and real tokens a second.

    python -m benchmarks.packing --steps 0
    python -m benchmarks.packing --buckets 4 --batch-tokens 2048 --packed-tokens 1024

The data is that of `data_scale`: durations are log-normal. Padding is that of all batches of an
epoch. A step is the loss and the gradients of the bundled SALM; the first of each shape, which
compiles, is not counted. Both ways take a step in turns.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data_scale, timing
from speechlm2_jax.batches import HostBatch
from speechlm2_jax.data import DataModule, SALMDataset
from speechlm2_jax.data.index.row_count import LARGE_ROWS
from speechlm2_jax.experiment import make_model
from speechlm2_jax.settings import find, load

WAYS = ("bucketed", "packed")


def main() -> None:
    """Measures, and prints the table and the line of JSON."""
    arguments = _arguments()
    if arguments.rows >= LARGE_ROWS:
        raise SystemExit(f"--rows: fewer than {LARGE_ROWS}, so that all are in memory")
    path = find(arguments.config)
    model: Any = make_model(load(arguments.config)["model"], near=(path.resolve().parent,))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_scale._write_recording(folder / "long.wav")
        data_scale._write_manifest(folder / "rows.jsonl", arguments.rows)
        data = {way: _data(way, folder / "rows.jsonl", model, arguments) for way in WAYS}
        rows = {way: {"way": way, **_padding(module)} for way, module in data.items()}
        if arguments.steps:
            streams = {way: module.train_batches() for way, module in data.items()}
            speeds = _speeds(streams, _step_of(model), model, arguments.steps)
            for way, found in speeds.items():
                rows[way] |= found
            for stream in streams.values():
                stream.close()
    result = {**vars(arguments), "ways": rows, "machine": timing.machine()}
    timing.report(list(rows.values()), result)


def _data(way: str, manifest: Path, model: Any, arguments: argparse.Namespace) -> DataModule:
    train: dict[str, Any] = {
        "input_cfg": [{"type": "nemo", "manifest_filepath": str(manifest)}],
        "audio_locator_tag": model.audio_locator_tag,
        "prompt_format": "auto",
        "token_equivalent_duration": 0.08,
        "batch_tokens": arguments.batch_tokens,
        "use_multimodal_sampling": True,
        "use_bucketing": True,
        "num_buckets": arguments.buckets,
        "shuffle": True,
        "seed": 1,
    }
    if way == "packed":
        train |= {"packed": True, "packed_tokens": arguments.packed_tokens}
    module = DataModule({"train_ds": train}, model.tokenizer, SALMDataset(model.tokenizer))
    module.setup(frame_count=model.frame_count)
    return module


def _padding(module: DataModule) -> dict[str, Any]:
    """What of the LLM's positions and of the encoder's samples is padding, over an epoch."""
    measures: Any = module.prepared().contents.measures  # type: ignore[attr-defined]
    buckets = module.plan().buckets
    positions = samples = 0
    room, audio, unused = 0, 0, 0
    for batch in module.plans():
        shape: Any = buckets[batch.bucket].shape
        chosen = [index for group in batch.groups for index in group]
        positions += int(measures.positions[chosen].sum())
        samples += int(measures.samples[chosen].sum())  # each has one clip
        room += len(batch.groups) * shape.sequences * shape.tokens
        audio += len(chosen) * shape.samples
        unused += len(batch.groups) * shape.clips * shape.samples
    return {
        "shapes": len(buckets),
        "token padding": f"{1 - positions / room:.2%}",
        "audio padding of clips": f"{1 - samples / audio:.2%}",
        "with places without a clip": f"{1 - samples / unused:.2%}",
    }


Step = Callable[[HostBatch], None]


def _step_of(model: Any) -> Step:
    """The loss and the gradients of what is trained, waited for."""
    variables = model.variables
    names = [path for path, is_on in model.trainable.items() if np.any(is_on)]
    trained = {path: variables[path] for path in names}

    @jax.jit
    def step(trained: Any, variables: Any, batch: Any) -> Any:
        def objective(trained: Any) -> Any:
            return model.losses(variables | trained, batch, key=None, train=True).loss.total

        return jax.value_and_grad(objective)(trained)

    def run(batch: HostBatch) -> None:
        jax.block_until_ready(step(trained, variables, jax.tree.map(jnp.asarray, batch.arrays)))

    return run


def _speeds(
    streams: dict[str, Iterator[HostBatch]], step: Step, model: Any, steps: int
) -> dict[str, dict[str, float]]:
    seen = {way: set[str]() for way in streams}
    tokens, seconds = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0.0)
    done = dict.fromkeys(streams, 0)
    while min(done.values()) < steps:
        for way, stream in streams.items():
            batch = next(stream)
            if batch.bucket not in seen[way]:
                seen[way].add(batch.bucket)
                timing.log(f"{way}: compiling {batch.bucket} ...")
                step(batch)
                continue
            begin = time.process_time()
            step(batch)
            seconds[way] += time.process_time() - begin
            tokens[way] += model.count_tokens(batch)[0]
            done[way] += 1
    return {
        way: {
            "real tokens per processor second": round(tokens[way] / seconds[way], 1),
            "steps": done[way],
        }
        for way in streams
    }


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--config", default="salm")
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--buckets", type=int, default=20)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--packed-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20, help="of each way; 0: padding alone")
    return parser.parse_args()


if __name__ == "__main__":
    main()
