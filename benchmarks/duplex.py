"""Times a training step and conversations of a full-duplex model of a named shape.

    python -m benchmarks.duplex --preset small --batch 2 --seconds 8
    python -m benchmarks.duplex --preset tinyllama --dtype bfloat16 --only run --batch 1

The weights are random and all but the codec's are trained; AdamW, clipping at 1.0. Conversations
are `offline_inference`: of all rows with the agent's audio, of one row with it, and of one row
without, from which the time of an 80 ms frame follows. The parts are written to `--parts` if they
are not there yet (benchmarks/duplex_parts.py); benchmarks/peers/nemo_duplex.py runs NeMo on them.
Needs the JAX stack only.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from benchmarks import duplex_parts, timing
from benchmarks.duplex_work import Conversations, DuplexWork
from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.models import DuplexS2SModel
from speechlm2_jax.training.run import huge_pages


def main() -> None:
    """Runs what is asked for and prints the table and the line of JSON."""
    arguments = _arguments()
    model, dtype = load(arguments)
    work = DuplexWork(model, Conversations(batch=arguments.batch, seconds=arguments.seconds))
    result: dict[str, Any] = {
        **{name: value for name, value in vars(arguments).items() if name != "parts"},
        "dtype": dtype,
        "parameters_m": round(work.count() / 1e6, 3),
        "trainable_m": round(work.count(trained_only=True) / 1e6, 3),
        "machine": timing.machine(),
    }
    rows = []
    if arguments.only != "talk":
        rows.append(_train(work, arguments, result))
    if arguments.only != "train":
        rows += _conversations(work, arguments, result)
    result["peak_host_memory_gib"] = timing.peak_host_memory_gib()
    result["peak_memory_gib"] = timing.peak_device_memory_gib()
    timing.report(rows, result)


def load(arguments: argparse.Namespace) -> tuple[DuplexS2SModel, str]:
    """Opens the model of `preset`, `parts` and `dtype`, and names its dtype.

    The parts are made if they are not there. Compiled programs are kept.
    """
    keep_compiled_programs("auto")
    preset = arguments.preset
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    folder = arguments.parts or Path("runs/benchmarks") / f"duplex_{preset}"
    if not (folder / duplex_parts.CONFIG).exists():
        timing.log(f"writing the parts of {preset} to {folder} ...")
        duplex_parts.write(folder, duplex_parts.PRESETS[preset], weights=preset != "tinyllama")
    if (folder / duplex_parts.WEIGHTS).exists():
        return DuplexS2SModel.from_pretrained(folder / duplex_parts.WEIGHTS, dtype=dtype), dtype
    cfg = json.loads((folder / duplex_parts.CONFIG).read_text())
    return DuplexS2SModel(duplex_parts.located(cfg, folder)).astype(dtype), dtype


def _train(
    work: DuplexWork, arguments: argparse.Namespace, result: dict[str, Any]
) -> dict[str, Any]:
    timing.log("compiling the training step ...")
    step = work.training(arguments.remat)
    first_s, loss = timing.timed(step)
    taken = timing.measure(step, repeats=arguments.repeats)
    flops = work.training_flops()
    result |= {
        "train_step_s": taken.as_list(),
        "train_processor_s": taken.processor_s,
        "train_first_step_s": first_s,
        "train_tflop": flops / 1e12,
        "first_loss": loss,
    }
    return _row("training step", taken, first_s, arguments.batch * work.sizes.frames)


def _conversations(
    work: DuplexWork, arguments: argparse.Namespace, result: dict[str, Any]
) -> list[dict[str, Any]]:
    kinds = {"infer": (arguments.batch, True), "infer1": (1, True), "frame": (1, False)}
    if arguments.batch == 1:
        del kinds["infer"]
    rows = []
    for name, (batch, decode_audio) in kinds.items():
        timing.log(f"compiling conversations: {name} ...")
        run = work.conversations(batch, decode_audio=decode_audio)
        first_s, _ = timing.timed(run)
        taken = timing.measure(run, repeats=max(3, arguments.repeats // 2))
        result |= {
            f"{name}_s": taken.as_list(),
            f"{name}_processor_s": taken.processor_s,
            f"{name}_first_s": first_s,
        }
        output = "with audio" if decode_audio else "codes only"
        what = f"offline_inference, {batch} x {arguments.seconds:g} s, {output}"
        rows.append(_row(what, taken, first_s, work.sizes.frames))
    result["frame_ms"] = 1e3 * result["frame_s"][0] / work.sizes.frames
    return rows


def _row(what: str, taken: timing.Timing, first_s: float, frames: int) -> dict[str, Any]:
    return {
        "what": what,
        "time (fastest to slowest)": str(taken),
        "processor, s": taken.processor_s,
        "first call, s": first_s,
        "ms per frame": 1e3 * taken.median_s / frames,
    }


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=duplex_parts.PRESETS, default="tiny")
    add("--parts", type=Path, help="where the parts are, or go")
    add("--batch", type=int, default=4)
    add("--seconds", type=float, default=8.0, help="of each conversation")
    add("--repeats", type=int, default=5)
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    add("--remat", choices=("none", "dots", "full"), default="none")
    add("--only", choices=("train", "talk"))
    return parser.parse_args()


if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()
    main()
