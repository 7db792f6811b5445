"""The chunked cross-entropy is the plain one, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.networks import losses
from speechlm2_jax.networks.losses import chunked_cross_entropy, cross_entropy_by_sequence

FP32_RTOL = 1e-5


def _case(seed: int, batch: int, length: int, width: int = 8, vocab: int = 13):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    mask = jnp.asarray(rng.random((batch, length)) < 0.4)
    return hidden, head, targets, mask


def _plain(hidden, head, targets, mask):
    logprobs = jax.nn.log_softmax(hidden @ head.T)
    picked = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    return -(picked * mask).sum()


@pytest.mark.parametrize("chunk_tokens", [2, 7, 1000])
def test_chunks_change_neither_loss_nor_gradient_nor_accuracy(monkeypatch, chunk_tokens):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, targets, mask = _case(0, 3, 11)

    def chunked(hidden, head):
        loss, accuracy = chunked_cross_entropy(
            hidden, targets, mask, lambda h: h @ head.T, sequences_per_shard=1
        )
        return loss.total, (loss.count, accuracy.total)

    (total, (count, correct)), grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(
        hidden, head
    )
    expected, expected_grads = jax.value_and_grad(_plain, (0, 1))(hidden, head, targets, mask)
    np.testing.assert_allclose(total, expected, rtol=FP32_RTOL)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=FP32_RTOL, atol=1e-6)
    assert count == mask.sum()
    assert correct == (mask & (jnp.argmax(hidden @ head.T, -1) == targets)).sum()


@pytest.mark.parametrize("chunk_tokens", [2, 7, 1000])
def test_each_sequence_has_its_own_sum(monkeypatch, chunk_tokens):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk_tokens)
    hidden, head, targets, mask = _case(0, 3, 11)
    mask = mask.at[1].set(False)
    found = cross_entropy_by_sequence(
        hidden, targets, mask, lambda h: h @ head.T, sequences_per_shard=1
    )
    for row in range(3):
        one = (hidden[row : row + 1], head, targets[row : row + 1], mask[row : row + 1])
        np.testing.assert_allclose(found.total[row], _plain(*one), rtol=FP32_RTOL)
    assert found.count.tolist() == mask.sum(axis=1).tolist() and found.total[1] == 0


def test_no_target_gives_zero_loss_and_finite_zero_gradient():
    hidden, head, targets, mask = _case(1, 2, 5)

    def mean_loss(hidden):
        loss, _ = chunked_cross_entropy(
            hidden, targets, jnp.zeros_like(mask), lambda h: h @ head.T, sequences_per_shard=1
        )
        return loss.mean()

    value, grad = jax.value_and_grad(mean_loss)(hidden)
    assert value == 0.0
    assert not np.asarray(grad).any()


@pytest.mark.parametrize(("trains_head", "dots"), [(False, 2), (True, 3)])
def test_no_logits_are_computed_twice(monkeypatch, trains_head, dots):
    """Logits, the gradient of the hidden states, and that of the head only where it is trained."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    hidden, head, targets, mask = _case(0, 3, 11)

    def step(hidden, head):
        def mean_loss(hidden, trained):
            weight = trained if trains_head else head
            loss, _ = chunked_cross_entropy(
                hidden, targets, mask, lambda h: h @ weight.T, sequences_per_shard=1
            )
            return loss.mean()

        return jax.value_and_grad(mean_loss, (0, 1))(hidden, head)

    assert str(jax.make_jaxpr(step)(hidden, head)).count("dot_general[") == dots
    (value, grads) = jax.jit(step)(hidden, head)
    expected, expected_grads = jax.value_and_grad(_plain, (0, 1))(hidden, head, targets, mask)
    np.testing.assert_allclose(value, expected / mask.sum(), rtol=FP32_RTOL)
    np.testing.assert_allclose(grads[0], expected_grads[0] / mask.sum(), rtol=FP32_RTOL, atol=1e-6)
    of_head = expected_grads[1] / mask.sum() if trains_head else jnp.zeros_like(head)
    np.testing.assert_allclose(grads[1], of_head, rtol=FP32_RTOL, atol=1e-6)
