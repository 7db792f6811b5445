"""Connectionist temporal classification: loss against torch, decoding by hand, training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from speechlm2_jax.asr import ctc
from speechlm2_jax.asr.ctc import clip_indices, collapse, pack_labels

TOLERANCE = 1e-4


def ctc_loss(*arrays):
    return ctc.ctc_loss(*map(jnp.asarray, arrays))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_loss_and_gradient_equal_torch(rng):
    logits = rng.normal(size=(3, 9, 6)).astype(np.float32)
    frames, lengths = np.array([9, 6, 4], np.int32), np.array([3, 2, 1], np.int32)
    labels = np.array([[1, 1, 4], [0, 3, 0], [2, 0, 0]], np.int32)

    given = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.ctc_loss(
        given.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels),
        torch.tensor(frames),
        torch.tensor(lengths),
        blank=5,
        reduction="none",
        zero_infinity=True,
    )
    expected.sum().backward()
    losses, counts = ctc_loss(jnp.asarray(logits), frames, labels, lengths)
    gradient = jax.grad(lambda x: ctc_loss(x, frames, labels, lengths)[0].sum())(
        jnp.asarray(logits)
    )
    np.testing.assert_allclose(losses, expected.detach().numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(gradient, given.grad.numpy(), atol=TOLERANCE)
    assert counts.tolist() == [1, 1, 1]


def test_loss_is_the_sum_over_all_paths(rng):
    logits = rng.normal(size=(1, 4, 3)).astype(np.float32)
    log_probs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    paths = [
        path
        for path in itertools.product(range(3), repeat=4)
        if collapse(np.array(path), 2) == [0, 1]
    ]
    likelihood = sum(np.exp(sum(log_probs[t, c] for t, c in enumerate(path))) for path in paths)
    losses, _ = ctc_loss(jnp.asarray(logits), np.array([4]), np.array([[0, 1]]), np.array([2]))
    assert losses[0] == pytest.approx(-np.log(likelihood), abs=TOLERANCE)


def test_a_sequence_too_short_for_its_labels_or_without_any_does_not_count(rng):
    logits = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    labels = np.array([[1, 1, 2], [0, 0, 0]], np.int32)  # a repeated label needs a blank between
    losses, counts = ctc_loss(logits, np.array([3, 3]), labels, np.array([3, 0]))
    assert counts.tolist() == [0, 0] and losses.tolist() == [0, 0]
    gradient = jax.grad(lambda x: ctc_loss(x, np.array([3, 3]), labels, np.array([3, 0]))[0].sum())(
        logits
    )
    assert np.all(np.asarray(gradient) == 0)


def test_frames_and_labels_beyond_the_lengths_change_nothing(rng):
    logits = rng.normal(size=(1, 5, 4)).astype(np.float32)
    padded = np.concatenate([logits, rng.normal(size=(1, 3, 4)).astype(np.float32)], axis=1)
    short = ctc_loss(jnp.asarray(logits), np.array([5]), np.array([[1, 2]]), np.array([2]))[0]
    long = ctc_loss(jnp.asarray(padded), np.array([5]), np.array([[1, 2, 3]]), np.array([2]))[0]
    np.testing.assert_allclose(short, long, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "spelt"),
    [
        ([], []),
        ([3, 3, 3], []),
        ([0, 0, 3, 0, 1, 1], [0, 0, 1]),
        ([2, 3, 3, 2], [2, 2]),
    ],
)
def test_collapse_merges_repeats_then_drops_blanks(path, spelt):
    assert collapse(np.array(path, np.int32), blank=3) == spelt


def test_best_path_is_blank_beyond_the_audio(rng):
    logits = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    path = np.asarray(ctc.best_path(logits, jnp.array([4, 2])))
    assert (path[1, 2:] == 2).all()
    np.testing.assert_array_equal(path[0], np.asarray(logits[0]).argmax(-1))


def test_labels_are_the_scored_targets_in_order():
    labels, count = pack_labels(
        jnp.asarray([[0, 7, 0, 8, 9]]), jnp.asarray([[False, True, False, True, True]])
    )
    assert labels[0, :3].tolist() == [7, 8, 9] and count.tolist() == [3]


def test_clip_indices_come_from_the_frame_indices():
    index = jnp.asarray([[-1, 10, 11, -1], [-1, -1, -1, -1], [0, 1, 2, -1]])
    assert clip_indices(index, 5).tolist() == [2, -1, 0]
