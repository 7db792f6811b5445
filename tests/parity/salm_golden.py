"""The four SALM runs recorded from NeMo 3.0.0, and models and batches made from them."""

import functools
import json
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from speechlm2_jax.batches import BatchShape, SalmBatch, SalmExample, assemble_salm_batch
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.readers import memory_source
from speechlm2_jax.conversion.salm import salm_table, tied_aliases
from speechlm2_jax.models import SALM
from speechlm2_jax.sharding import Sharding, make_sharding
from speechlm2_jax.training.optimizer import Optimizer, read_optimizer
from speechlm2_jax.training.state import Partition, first_state, plan_layout, put
from speechlm2_jax.training.step import StepFunctions

DATA = Path(__file__).parents[1] / "data" / "salm"
RUNS = ("llama_adapter", "qwen3_lora", "llama_full", "qwen3_tied_full")
BATCH_OF = {"llama_full": "llama_adapter", "qwen3_tied_full": "qwen3_lora"}
IGNORED_TARGET = -100
ACTIVATION_ATOL = 1e-4
"""goldens README: activations of a whole model in fp32."""
LOSS_RTOL = 1e-5
GRADIENT_ATOL = 1e-4
STEPS = 5


@contextmanager
def working_in(folder: Path):
    """The goldens name their parts relative to their own folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@functools.cache
def facts(run: str) -> dict:
    return json.loads((DATA / f"{run}.json").read_text())


@functools.cache
def tensors(run: str) -> dict[str, np.ndarray]:
    return load_file(DATA / f"{run}.safetensors")


def under(run: str, prefix: str) -> dict[str, np.ndarray]:
    """The tensors below `prefix/`, without it."""
    return {
        k.removeprefix(f"{prefix}/"): v
        for k, v in tensors(run).items()
        if k.startswith(f"{prefix}/")
    }


def make_model(run: str, **changes) -> SALM:
    """A model at the run's start, computing as NeMo does where padding matters."""
    cfg = {**facts(run)["cfg_in"], "nemo_exact": True, **changes}
    with working_in(DATA):
        model = SALM(cfg)
    if run in BATCH_OF:
        model.variables |= load_part(model, under(run, "init"))
    else:
        saved = SALM.from_pretrained(DATA / f"{run}_hf")
        model.variables = saved.variables
    return model


def load_part(model: SALM, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reads the variables that a few of NeMo's tensors fill."""
    # the recorder stored counters, which are scalars, as arrays of one
    given = {n: v.reshape(()) if n.endswith("batches_tracked") else v for n, v in given.items()}
    table = salm_table(model._blueprint.network)
    rules = tuple(r for r in table.rules if r.source.replace("{layer}", "0") in given)
    infos = {r.target: model.infos[r.target] for r in rules}
    return mapping.load(memory_source(given), mapping.Table(rules), infos)


def golden_examples(run: str) -> list[SalmExample]:
    run = BATCH_OF.get(run, run)
    batch = under(run, "batch")
    placeholder, pad = facts(run)["audio_locator_tag_id"], facts(run)["text_pad_id"]
    clips = iter([a[:n] for a, n in zip(batch["audios"], batch["audio_lens"], strict=True)])
    examples = []
    for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["loss_mask"], strict=True)):
        start = int(np.argmax(ids != pad))
        count = int((ids == placeholder).sum())
        examples.append(
            SalmExample(
                id=f"c{i}",
                tokens=ids[start:].astype(np.int32),
                loss_mask=mask[start:].astype(bool),
                audio=tuple(next(clips) for _ in range(count)),
            )
        )
    return examples


def golden_batch(
    model: SALM, run: str, *, extra_tokens: int = 0, extra_samples: int = 0
) -> SalmBatch:
    """The recorded batch, padded on the right, with more padding if asked."""
    examples = golden_examples(run)
    clips = [c for e in examples for c in e.audio]
    steps = facts(BATCH_OF.get(run, run))["training_step_outputs_step0"]["sequence_length"]
    return assemble_salm_batch(
        [examples],
        BatchShape(
            sequences=len(examples),
            tokens=steps + extra_tokens,
            clips=len(clips),
            samples=max(map(len, clips)) + extra_samples,
        ),
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
    )


def left_padded(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Moves right-padded rows [B, T, ...] to the right edge, zeros before them."""
    out = np.zeros_like(rows)
    for i, n in enumerate(lengths):
        out[i, rows.shape[1] - n :] = rows[i, :n]
    return out


@dataclass(frozen=True)
class Training:
    """A few steps of the recorded recipe."""

    losses: list[float]
    gradient_norms: list[float]
    gradients: dict[str, np.ndarray]
    """Of the first step, of the mean loss, before clipping."""
    buffers: dict[str, np.ndarray]
    """After the first step."""
    final: dict[str, np.ndarray]
    program: str
    """The text of the compiled step."""


def five_steps(
    model: Any,
    batch: Any,
    sharding: Sharding | None = None,
    steps: int = STEPS,
    rates: Sequence[float] | None = None,
) -> Training:
    """Trains through the trainer's own step: clip at 1, AdamW, a constant rate unless given."""
    config = read_optimizer(model.optimizer)
    sharding = sharding or make_sharding(devices=jax.devices()[:1])
    partition = Partition.of(model.infos, model.trainable)
    optimizer = Optimizer(transform=config.transform(), clip_norm=1.0, masks=partition.masks)
    functions = StepFunctions(
        losses=model.losses, optimizer=optimizer, sharding=sharding, seed=0, nemo_exact=True
    )
    layout = plan_layout(model.infos, partition, optimizer, sharding, jnp.float32)
    values = {p: np.asarray(v) for p, v in model.variables.items()}
    state = first_state(values, layout, optimizer)
    frozen = put(values, layout.frozen, copy=True)

    @jax.jit
    def step(state, frozen, batch, rate):
        sums = functions.micro(state, state.buffers, frozen, batch, 0)
        return functions.finish(state, sums, rate), sums

    placed = sharding.put_batch(batch)
    reports, first = [], None
    rates = [config.lr] * steps if rates is None else rates
    whole = [jax.device_put(np.float32(rate), sharding.replicated) for rate in rates]
    program = step.lower(state, frozen, placed, whole[0]).compile()
    for rate in whole:
        (state, report), sums = program(state, frozen, placed, rate)
        state = jax.device_put(state, layout.state_shardings)
        first = first or jax.device_get(sums)
        reports.append(report)
    return Training(
        losses=[float(r.loss) for r in reports],
        gradient_norms=[float(r.grad_norm) for r in reports],
        gradients=first.grads,
        buffers=first.buffers,
        final=jax.device_get({**frozen, **state.buffers, **state.trainable}),
        program=program.as_text(),
    )


def named_values(model: SALM, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values by variable path -> by NeMo's name; zeros where there is none."""
    zeros = {p: np.zeros(i.shape, np.float32) for p, i in model.infos.items()}
    named = model.state_dict(zeros | values)
    aliases = tied_aliases(model._blueprint.network)
    return named | {alias: named[name] for alias, name in aliases.items()}


def assert_first_step_equals_nemo(model: SALM, run: str, training: Training) -> None:
    """Loss, every gradient and the batch-norm statistics of the first step."""
    np.testing.assert_allclose(training.losses[0], facts(run)["train_losses"][0], rtol=LOSS_RTOL)
    named = named_values(model, training.gradients)
    for name, norm in facts(run)["grad_norms"].items():
        np.testing.assert_allclose(
            np.linalg.norm(named[name]), norm, rtol=1e-3, atol=GRADIENT_ATOL, err_msg=name
        )
    # the gradients were recorded after clipping to norm 1, the norms before
    clip = max(1.0, facts(run)["grad_norm_before_clip"][0])
    for name, golden in under(run, "grad").items():
        np.testing.assert_allclose(
            named[name], golden * clip, rtol=1e-3, atol=GRADIENT_ATOL, err_msg=name
        )
    statistics = named_values(model, training.buffers)
    for name, golden in under(run, "buffers_after_step0").items():
        np.testing.assert_allclose(statistics[name], golden, atol=ACTIVATION_ATOL, err_msg=name)
