"""Padding, bucket, group and batch neighbours change no loss, gradient, statistic or response."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.batches import BatchShape, assemble_salm_batch
from speechlm2_jax.models import SALM
from tests.parity.salm_golden import DATA, golden_examples

FP32_ATOL = 1e-5
RUNS = ("llama_adapter", "qwen3_lora")


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return request.param


@pytest.fixture(scope="module")
def model(run):
    return SALM.from_pretrained(DATA / f"{run}_hf")


@pytest.fixture(scope="module")
def gradients(model):
    names = [p for p, on in model.trainable.items() if np.any(on)]

    def objective(trained, variables, batch):
        losses = model.losses(variables | trained, batch, key=None, train=True)
        return losses.loss.total, losses

    step = jax.jit(jax.value_and_grad(objective, has_aux=True))

    def of(batch):
        (total, losses), grads = step(
            {p: model.variables[p] for p in names}, model.variables, batch
        )
        return float(total), jax.device_get(losses), jax.device_get(grads)

    return of


def _shape(*, tokens=72, samples=9600, clips=3, rows=3):
    return BatchShape(sequences=rows, tokens=tokens, clips=clips, samples=samples)


def _batch(model, groups, shape, rows=None):
    batch = assemble_salm_batch(
        groups,
        shape,
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
        rows=rows,
    )
    return jax.tree.map(jnp.asarray, batch)


def _assert_same(got, expected):
    np.testing.assert_allclose(got[0], expected[0], rtol=FP32_ATOL)
    for path in expected[2]:
        scale = max(1.0, np.abs(expected[2][path]).max())
        np.testing.assert_allclose(
            got[2][path] / scale, expected[2][path] / scale, atol=FP32_ATOL, err_msg=path
        )
    for path in expected[1].buffers:
        np.testing.assert_allclose(
            got[1].buffers[path], expected[1].buffers[path], atol=FP32_ATOL, err_msg=path
        )


def test_packed_conversations_have_the_loss_of_unpacked_ones(model, run, gradients):
    examples = golden_examples(run)
    apart = gradients(_batch(model, [examples], _shape()))
    packed = _batch(model, [examples], _shape(tokens=120, rows=2), rows=[[1, 0, 1]])
    assert packed.segments.max(axis=-1).tolist() == [[1, 2]]
    assert (packed.positions == 0).sum() > 3  # each starts from 0; padding is 0 too
    _assert_same(gradients(packed), apart)


def test_a_larger_bucket_changes_neither_loss_nor_gradient(model, run, gradients):
    examples = golden_examples(run)
    small = gradients(_batch(model, [examples], _shape()))
    large = _shape(tokens=104, samples=16000, clips=4, rows=4)
    _assert_same(gradients(_batch(model, [examples], large)), small)


def test_grouping_changes_neither_loss_nor_gradient(model, run, gradients):
    examples = golden_examples(run)
    together = gradients(_batch(model, [examples], _shape()))
    apart = gradients(_batch(model, [[e] for e in examples], _shape(rows=1)))
    _assert_same(apart, together)


def test_neighbours_change_neither_loss_nor_gradient():
    # LoRA alone is trained, so no batch norm ties the conversations together
    model = SALM.from_pretrained(DATA / "qwen3_lora_hf")
    examples = golden_examples("qwen3_lora")
    names = [p for p, on in model.trainable.items() if np.any(on)]

    def objective(trained, batch, variables):
        return model.losses(variables | trained, batch, key=None, train=True).loss.total

    step = jax.jit(jax.value_and_grad(objective))
    trained, shape = {p: model.variables[p] for p in names}, _shape()
    total, together = step(trained, _batch(model, [examples], shape), model.variables)
    alone = [step(trained, _batch(model, [[e]], shape), model.variables) for e in examples]
    np.testing.assert_allclose(sum(float(t) for t, _ in alone), total, rtol=FP32_ATOL)
    for path in names:
        summed = sum(np.asarray(g[path]) for _, g in alone)
        np.testing.assert_allclose(summed, together[path], atol=1e-4, err_msg=path)


def test_a_batch_without_audio_has_a_finite_loss(model, run):
    text_only = [e for e in golden_examples(run) if not e.audio]
    batch = _batch(model, [text_only], _shape(clips=0, samples=0, rows=1))
    losses = jax.jit(lambda v, b: model.losses(v, b, key=None, train=False))(model.variables, batch)
    assert np.isfinite(losses.loss.total) and losses.loss.count > 0


def test_every_random_draw_belongs_to_its_example():
    """Dropout on: an example's loss depends on its place in the global batch, not on padding."""
    cfg = {**SALM.from_pretrained(DATA / "qwen3_lora_hf").cfg}
    cfg["lora"] = {**cfg["lora"], "lora_dropout": 0.5}
    model = SALM(cfg, near=(DATA / "qwen3_lora_hf", DATA))
    model.variables = SALM.from_pretrained(DATA / "qwen3_lora_hf").variables
    examples = golden_examples("qwen3_lora")[:1]
    key = jax.random.key(0)
    losses = jax.jit(lambda v, b: model.losses(v, b, key=key, train=True))

    def total(shape, row_offset=0):
        batch = _batch(model, [examples], shape)
        batch = dataclasses.replace(batch, sequence_ids=batch.sequence_ids + row_offset)
        return float(losses(model.variables, batch).loss.total)

    small, large = _shape(), _shape(tokens=96, rows=4)
    np.testing.assert_allclose(total(small), total(large), rtol=FP32_ATOL)
    assert abs(total(small) - total(small, row_offset=7)) > 1e-3
