"""One part of the measurement, in a process of its own: `python -m benchmarks.device.parts NAME`.

Prints a line of JSON per row (benchmarks/device/rows.py); the rest goes to standard error.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import duplex_parts, timing
from benchmarks.device import turns
from benchmarks.device.plan import FULL, TINY, Plan
from benchmarks.device.rows import Row, Rows, called
from benchmarks.device.salm import compute_dtype, device_gib, generation, training
from benchmarks.duplex_work import Conversations, DuplexWork
from speechlm2_jax.models import AudioCodec, DuplexS2SModel
from speechlm2_jax.training.run.throughput import peak_flops

DUPLEX_GIB, CODEC_GIB_PER_ROW = 14.0, 0.6
"""Weights in fp32 and in bf16 of a model of 1.35 billion parameters, the codec and the rest."""


def main() -> None:
    """Measures the part that is named."""
    parser = timing.parser(__doc__)
    parser.add_argument("name", choices=("machine", *MEASURE))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0, help="until it is stopped")
    arguments = parser.parse_args()
    if arguments.name == "machine":
        rows = Rows("machine", None, time.monotonic() + arguments.seconds)
        rows.put("machine", "measured", machine=timing.machine(), memory_gib=device_gib())
        return
    started = time.monotonic()
    rows = Rows(arguments.name, device_gib(), started + arguments.seconds)
    MEASURE[arguments.name](TINY if arguments.tiny else FULL, rows)


def matmul(plan: Plan, rows: Rows) -> None:
    """Products of square matrices, and a copy of memory."""
    size = plan.matmul_size
    for name, dtype, precision in (
        ("bf16", jnp.bfloat16, "default"),
        ("fp32, default precision (TF32 on a GPU)", jnp.float32, "default"),
        ("fp32, highest precision", jnp.float32, "highest"),
    ):
        what = f"{name}, {size} x {size} x {size}"
        rows.measure(what, partial(_products, plan, dtype, precision))
    rows.measure(f"copy of {plan.copy_bytes / 2**20:,.0f} MiB", partial(_copy, plan))


def _products(plan: Plan, dtype: Any, precision: str) -> Row:
    size, count = plan.matmul_size, plan.matmul_chain
    key = jax.random.key(0)
    # a standard deviation of 1 / sqrt(size) keeps the products' values near 1
    weight = (jax.random.normal(key, (size, size)) / np.sqrt(size)).astype(dtype)
    x = jax.random.normal(key, (size, size)).astype(dtype)

    @jax.jit
    def chain(x: jax.Array, weight: jax.Array) -> jax.Array:
        product = partial(jnp.matmul, precision=precision)
        return jax.lax.fori_loop(0, count, lambda _, y: product(y, weight), x)

    taken, row = called(lambda: chain(x, weight).block_until_ready(), plan.repeats)
    flops = 2 * size**3 * count / taken.median_s
    peak = peak_flops(jax.devices()[0].device_kind) if dtype == jnp.bfloat16 else None
    share = None if peak is None else flops / peak
    return {**row, "rate": flops / 1e12, "rate_unit": "TFLOP/s", "share_of_peak": share}


def _copy(plan: Plan) -> Row:
    x = jnp.ones(plan.copy_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    taken, row = called(lambda: add(x).block_until_ready(), plan.repeats)
    moved = 2 * plan.copy_bytes / taken.median_s
    return {**row, "rate": moved / 1e9, "rate_unit": "GB/s", "note": "bytes read and written"}


def duplex(plan: Plan, rows: Rows) -> None:
    """Offline inference of a full-duplex model: ms per frame of 80 ms."""
    if not plan.is_tiny and not rows.fits(DUPLEX_GIB):
        rows.measure(f"{plan.duplex_preset}", dict, needed_gib=DUPLEX_GIB)
        return
    with tempfile.TemporaryDirectory() as name:
        work = _conversations(plan, Path(name))
        for batch in plan.conversations:
            for with_audio in (False, True):
                kind = "with audio" if with_audio else "codes only"
                what = f"{plan.duplex_preset}, {batch} x {plan.conversation_s:g} s, {kind}"
                rows.measure(what, partial(_converse, plan, work, batch, with_audio))


def _conversations(plan: Plan, folder: Path) -> DuplexWork:
    """A model of the preset, whose components are written to `folder` and read when first used."""
    duplex_parts.write(folder, duplex_parts.PRESETS[plan.duplex_preset], weights=False)
    cfg = json.loads((folder / duplex_parts.CONFIG).read_text())
    model = DuplexS2SModel(duplex_parts.located(cfg, folder)).astype(compute_dtype())
    sizes = Conversations(batch=max(plan.conversations), seconds=plan.conversation_s)
    return DuplexWork(model, sizes)


def _converse(plan: Plan, work: DuplexWork, batch: int, with_audio: bool) -> Row:
    run = work.conversations(batch, decode_audio=with_audio)
    taken, row = called(lambda: jax.block_until_ready(run()), max(3, plan.repeats // 2))
    frames = int(run()["tokens_len"][0])
    return {
        **row,
        "rate": 1e3 * taken.median_s / frames,
        "rate_unit": "ms/frame",
        "frames": frames,
        "parameters_m": work.count() / 1e6,
    }


def codec(plan: Plan, rows: Rows) -> None:
    """Encoding and decoding, fp32: seconds of audio per second."""
    preset = duplex_parts.PRESETS[plan.duplex_preset]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "codec.nemo"
        duplex_parts.write_codec(path, preset)
        model = AudioCodec.from_pretrained(path)
    for batch in plan.codec_batches:
        needed = 0.0 if plan.is_tiny else 1.0 + batch * CODEC_GIB_PER_ROW
        for name, call in _codec_calls(model, batch, plan.codec_seconds).items():
            what = f"{name}, {batch} x {plan.codec_seconds:g} s, float32"
            rows.measure(what, partial(_codec_row, plan, call, batch), needed_gib=needed)


def _codec_calls(model: AudioCodec, batch: int, seconds: float) -> dict[str, Callable[[], Any]]:
    random, samples = np.random.default_rng(0), round(seconds * model.sample_rate)
    audio = random.uniform(-0.3, 0.3, (batch, samples)).astype(np.float32)
    frames = -(-samples // model.samples_per_frame)
    codes = random.integers(0, model.codebook_size, (batch, frames, model.num_codebooks))
    samples_of, frames_of = np.full(batch, samples), np.full(batch, frames)
    return {
        "encode": lambda: jax.block_until_ready(model.encode(audio, samples_of)),
        "decode": lambda: jax.block_until_ready(model.decode(codes, frames_of)),
    }


def _codec_row(plan: Plan, call: Callable[[], Any], batch: int) -> Row:
    taken, row = called(call, plan.repeats)
    audio_s = batch * plan.codec_seconds
    return {
        **row,
        "rate": audio_s / taken.median_s,
        "rate_unit": "audio s/s",
        "real_time_factor": taken.median_s / audio_s,
    }


MEASURE: dict[str, Callable[[Plan, Rows], None]] = {
    "matmul": matmul,
    "training-15s": partial(training, "training-15s"),
    "training-40s": partial(training, "training-40s"),
    "generation": generation,
    "duplex": duplex,
    "codec": codec,
    "pytorch": turns.compare,
}

if __name__ == "__main__":
    main()
