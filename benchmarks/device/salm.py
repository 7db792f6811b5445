"""Training steps and generation of a SALM of a named shape, random weights drawn on the device."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.device.plan import GIB, Plan, Training, generation_gib, training_gib
from benchmarks.device.rows import Row, Rows, called
from benchmarks.salm_work import Work
from speechlm2_jax.training.run.throughput import peak_flops


def device_gib() -> float | None:
    """Memory that this process may take of the first device; None where that is not known."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit / GIB


def compute_dtype() -> str:
    """The dtype of computation: float32 on a CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def training(name: str, plan: Plan, rows: Rows) -> None:
    """The first batch that fits and does not run out of memory, then more settings."""
    job = plan.trainings[name]
    started = time.monotonic()
    for batch in job.batches:
        status = train_row(plan, rows, job, batch, job.remat)
        if status not in ("skipped", "out of memory"):
            break
    needed_s = time.monotonic() - started
    for batch, remat in job.extra:
        train_row(plan, rows, job, batch, remat, needed_s=needed_s)


def training_work(plan: Plan, seconds: float, batch: int, remat: Any) -> Work:
    """A model whose encoder, projection and LoRA are trained; nothing is drawn yet."""
    network = plan.shape.network(dtype=compute_dtype(), remat=remat)
    return Work(plan.shape, plan.training_sizes(seconds, batch), network)


def train_row(
    plan: Plan, rows: Rows, job: Training, batch: int, remat: str, *, needed_s: float = 0.0
) -> str:
    """Times one setting."""
    work = training_work(plan, job.seconds, batch, remat)
    what = f"{plan.preset}, {batch} x {job.seconds:g} s, {compute_dtype()}, remat {remat}"
    needed_gib = training_gib(work, remat)
    call = partial(_train, plan, work)
    return rows.measure(what, call, needed_gib=needed_gib, needed_s=needed_s)


def _train(plan: Plan, work: Work) -> Row:
    step = work.training()
    taken, row = called(step, plan.repeats)
    return {**row, **training_rates(work, taken.median_s), "last_loss": step()}


def training_rates(work: Work, step_s: float) -> Row:
    """Throughput, and model FLOP/s utilisation: `networks.flops` over the dense bf16 peak."""
    flops, peak = work.training_flops(), peak_flops(jax.devices()[0].device_kind)
    return {
        "rate": work.sizes.batch * work.sizes.seconds / step_s,
        "rate_unit": "audio s/s",
        "model_tflop": flops / 1e12,
        "tflop_per_s": flops / step_s / 1e12,
        "mfu": None if peak is None else flops / step_s / peak,
        "parameters_m": work.count() / 1e6,
        "trainable_m": work.count(trained_only=True) / 1e6,
    }


def generation_work(plan: Plan, batch: int) -> Work:
    """A model that is only decoded with; nothing is drawn yet."""
    network = plan.shape.network(dtype=compute_dtype())
    return Work(plan.shape, plan.generation_sizes(batch), network, inference_only=True)


def generation(plan: Plan, rows: Rows) -> None:
    """Greedy generation; the batches share one draw of weights."""
    variables = None
    for batch in plan.generation_batches:
        work = generation_work(plan, batch)
        if variables is not None:
            work.variables = variables
        what = f"{plan.preset}, {batch} x {plan.generation_seconds:g} s, {plan.new_tokens} tokens"
        needed = generation_gib(work, jnp.dtype(compute_dtype()).itemsize)
        if rows.measure(what, partial(_generate, plan, work), needed_gib=needed) == "measured":
            variables = work.variables


def _generate(plan: Plan, work: Work) -> Row:
    taken, row = called(work.generation(), max(3, plan.repeats // 2))
    prefilled = timing.measure(work.prefilling(), repeats=3)
    decoding_s = max(taken.median_s - prefilled.median_s, 0.0)
    token_ms = 1e3 * decoding_s / (plan.new_tokens - 1)
    return {
        **row,
        "rate": work.sizes.batch * plan.new_tokens / taken.median_s,
        "rate_unit": "tokens/s",
        "prefill_s": prefilled.as_list(),
        "ms_per_token": token_ms,
        "rtfx": work.sizes.batch * work.sizes.seconds / taken.median_s,
        "weight_gib": work.weight_bytes / GIB,
        "note": f"encoder and prompt {1e3 * prefilled.median_s:.4g} ms, "
        f"then {token_ms:.4g} ms a token",
    }
