"""Times the data loader alone: planned batches, read and assembled, without a model's work.

    python -m benchmarks.loader --config salm --batches 100
    python -m benchmarks.loader --config run.yaml data.train_ds.num_workers=4

Takes what train.py takes. A training step that is slower than a batch here never waits for data.
Needs lhotse and what else the data package needs.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import itertools
from typing import Any

from benchmarks import timing
from speechlm2_jax.experiment import check_blocks, make_data, make_model
from speechlm2_jax.settings import find, ignored_report, load


def main() -> None:
    """Reads batches and prints the table and the line of JSON."""
    arguments = _arguments()
    timing.log(f"reading {find(arguments.config)} ...")
    planning_s, (model, data) = timing.timed(lambda: _data(arguments))
    stream = iter(data.train_batches())
    first_s, first = timing.timed(lambda: next(stream))
    timing.log(f"reading {arguments.batches} batches ...")
    taken_s, batches = timing.timed(lambda: list(itertools.islice(stream, arguments.batches)))
    rows = sum(len(batch.ids) for batch in batches)
    megabytes = sum(_bytes(batch.arrays) for batch in batches) / 1e6
    result: dict[str, Any] = {
        **vars(arguments),
        "model": type(model).__name__,
        "planning_s": planning_s,
        "first_batch_s": first_s,
        "batch_s": taken_s / len(batches),
        "rows_per_s": rows / taken_s,
        "mb_per_s": megabytes / taken_s,
        "rows_of_first_batch": len(first.ids),
        "peak_host_memory_gib": timing.peak_host_memory_gib(),
        "machine": timing.machine(),
    }
    shown = ("planning_s", "first_batch_s", "batch_s", "rows_per_s", "mb_per_s")
    timing.report([{"what": name, "value": result[name]} for name in shown], result)


def _data(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, without weights, and its data with everything but the audio read."""
    settings = load(arguments.config, arguments.overrides)
    check_blocks(settings)
    with ignored_report():
        model = make_model(settings["model"], near=(find(arguments.config).resolve().parent,))
        data = make_data(settings["data"], model)
    data.setup(frame_count=model.frame_count)
    return model, data


def _bytes(arrays: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--config", default="salm")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("overrides", nargs="*", help="key=value, as train.py takes them")
    return parser.parse_args()


if __name__ == "__main__":
    main()
