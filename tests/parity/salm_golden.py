"""The four SALM runs recorded from NeMo 3.0.0, and models and batches made from them."""

import functools
import json
import os
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from speechlm2_jax.batches import BatchShape, SalmBatch, SalmExample, assemble_salm_batch
from speechlm2_jax.models import SALM

DATA = Path(__file__).parents[1] / "data" / "salm"
RUNS = ("llama_adapter", "qwen3_lora", "llama_full", "qwen3_tied_full")
BATCH_OF = {"llama_full": "llama_adapter", "qwen3_tied_full": "qwen3_lora"}
IGNORED_TARGET = -100


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
        given = under(run, "init")
        model.variables |= {p: jnp.asarray(v) for p, v in model.from_nemo_names(given).items()}
    else:
        saved = SALM.from_pretrained(DATA / f"{run}_hf")
        model.variables = saved.variables
    return model


def golden_examples(run: str) -> list[SalmExample]:
    run = BATCH_OF.get(run, run)
    batch = under(run, "batch")
    placeholder, pad = facts(run)["audio_locator_tag_id"], facts(run)["text_pad_id"]
    clips = iter(
        [a[:n] for a, n in zip(batch["audios"], batch["audio_lens"], strict=True)]
    )
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
            rows=len(examples),
            tokens=steps + extra_tokens,
            clips=len(clips),
            samples=max(map(len, clips)) + extra_samples,
        ),
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
        pad_id=model.text_pad_id,
    )


def left_padded(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Moves right-padded rows [B, T, ...] to the right edge, zeros before them."""
    out = np.zeros_like(rows)
    for i, n in enumerate(lengths):
        out[i, rows.shape[1] - n :] = rows[i, :n]
    return out
