"""Times a training step and a generation of a SALM of a named shape, random weights and features.

    python -m benchmarks.salm --preset small --batch 4 --seconds 8
    python -m benchmarks.salm --preset canary-qwen-2.5b --dtype bfloat16 --batch 32 --seconds 15

Encoder, projection and the LoRA adapters on query and value are trained, the LLM is frozen; AdamW,
clipping at 1.0. Generation is greedy and exactly `--answer` tokens long. Needs the JAX stack only.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
from typing import Any

import jax

from benchmarks import timing
from benchmarks.presets import PRESETS
from benchmarks.salm_work import Sizes, Work
from speechlm2_jax.training.run import huge_pages
from speechlm2_jax.training.run.throughput import peak_flops


def main() -> None:
    """Runs what is asked for and prints the table and the line of JSON."""
    arguments = _arguments()
    preset = PRESETS[arguments.preset]
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    sizes = Sizes(
        batch=arguments.batch,
        seconds=arguments.seconds,
        prompt=arguments.prompt,
        response=arguments.answer,
    )
    timing.log(f"making {arguments.preset} with random weights ...")
    work = Work(preset, sizes, preset.network(dtype=dtype, remat=arguments.remat))
    result: dict[str, Any] = {
        **vars(arguments),
        "dtype": dtype,
        "parameters_m": round(work.count() / 1e6, 2),
        "trainable_m": round(work.count(trained_only=True) / 1e6, 2),
        "machine": timing.machine(),
    }
    rows = []
    if arguments.only != "answer":
        rows.append(_train(work, arguments.repeats, result))
    if arguments.only != "train":
        rows.append(_generation(work, max(3, arguments.repeats // 2), result))
    result["peak_host_memory_gib"] = timing.peak_host_memory_gib()
    result["peak_memory_gib"] = timing.peak_device_memory_gib()
    timing.report(rows, result)


def _train(work: Work, repeats: int, result: dict[str, Any]) -> dict[str, Any]:
    timing.log("compiling the training step ...")
    step = work.training()
    compile_s, first_loss = timing.timed(step)
    taken = timing.measure(step, repeats=repeats)
    flops, kind = work.training_flops(), jax.devices()[0].device_kind
    peak = peak_flops(kind)
    audio_s = work.sizes.batch * work.sizes.seconds
    mfu = None if peak is None else flops / taken.median_s / peak
    result |= {
        "train_step_s": taken.as_list(),
        "train_processor_s": taken.processor_s,
        "train_audio_s_per_s": audio_s / taken.median_s,
        "train_first_step_s": compile_s,
        "train_tflop": flops / 1e12,
        "mfu": mfu,
        "first_loss": first_loss,
    }
    return _row("training step", taken, compile_s, flops, mfu, audio_s)


def _generation(work: Work, repeats: int, result: dict[str, Any]) -> dict[str, Any]:
    timing.log("compiling the generation ...")
    generate = work.generation()
    compile_s, _ = timing.timed(generate)
    taken = timing.measure(generate, repeats=repeats)
    audio_s = work.sizes.batch * work.sizes.seconds
    result |= {
        "generate_s": taken.as_list(),
        "generate_processor_s": taken.processor_s,
        "rtfx": audio_s / taken.median_s,
        "generate_first_s": compile_s,
    }
    return _row("answer", taken, compile_s, work.forward_flops(), None, audio_s)


def _row(
    what: str,
    taken: timing.Timing,
    first_s: float,
    flops: float,
    mfu: float | None,
    audio_s: float,
) -> dict[str, Any]:
    return {
        "what": what,
        "time (fastest to slowest)": str(taken),
        "processor, s": taken.processor_s,
        "first call, s": first_s,
        "model GFLOP": flops / 1e9,
        "GFLOP/s": flops / 1e9 / taken.median_s,
        "MFU": mfu,
        "audio s/s": audio_s / taken.median_s,
    }


def _arguments() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny")
    add("--batch", type=int, default=4)
    add("--seconds", type=float, default=4.0, help="audio per row")
    add("--prompt", type=int, default=16, help="prompt tokens")
    add(
        "--answer",
        type=int,
        default=32,
        help="response tokens of a training sequence; also the number generated",
    )
    add("--repeats", type=int, default=5)
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    add("--remat", choices=("none", "dots", "full"), default="none")
    add("--only", choices=("train", "answer"))
    return parser.parse_args()


if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()
    main()
