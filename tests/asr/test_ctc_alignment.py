"""Forced alignment against all paths of small lattices; padding and neighbours change nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechlm2_jax.asr import ctc_alignment
from speechlm2_jax.asr.ctc import collapse
from speechlm2_jax.asr.ctc_alignment import LabelFrames

TOLERANCE = 1e-5
FRAMES, CLASSES, LABELS = 6, 4, 4
align = jax.jit(ctc_alignment.align_labels)


def random_log_probs(seed, frames, classes=CLASSES):
    logits = np.random.default_rng(seed).normal(size=(frames, classes)) * 2
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


def batch_of(rows, frames=FRAMES, labels=LABELS):
    """Rows of (log-probabilities [T, C], labels) as padded arrays; what pads them is garbage."""
    classes = rows[0][0].shape[1]
    log_probs = np.full((len(rows), frames, classes), 3.0, np.float32)
    ids = np.full((len(rows), labels), 1, np.int32)
    for n, (own, text) in enumerate(rows):
        log_probs[n, : len(own)], ids[n, : len(text)] = own, text
    counts = [np.array([len(row[k]) for row in rows], np.int32) for k in (0, 1)]
    return jax.device_get(align(log_probs, counts[0], ids, counts[1]))


def best_by_brute_force(log_probs, labels):
    """Score and path of the best of all paths that collapse to the labels, or None."""
    blank = log_probs.shape[1] - 1
    paths = itertools.product(range(blank + 1), repeat=len(log_probs))
    fitting = [p for p in paths if collapse(np.array(p), blank) == list(labels)]
    scores = [sum(log_probs[t, c] for t, c in enumerate(p)) for p in fitting]
    return (max(scores), fitting[int(np.argmax(scores))]) if fitting else None


def runs_of(path, blank):
    """First frame and frame after the last of each label of a path."""
    starts = [t for t, c in enumerate(path) if c != blank and (not t or path[t - 1] != c)]
    ends = []
    for start in starts:
        end = start
        while end < len(path) and path[end] == path[start]:
            end += 1
        ends.append(end)
    return starts, ends


@given(
    seed=st.integers(0, 10**6),
    frames=st.integers(1, FRAMES),
    labels=st.lists(st.integers(0, CLASSES - 2), max_size=LABELS),
)
def test_the_path_is_the_best_of_all_paths(seed, frames, labels):
    log_probs = random_log_probs(seed, frames)
    found = LabelFrames(*(field[0] for field in batch_of([(log_probs, labels)])))
    best = best_by_brute_force(log_probs, labels)
    assert bool(found.fits) == (best is not None)
    if best is None:
        assert found.path_log_probs == -np.inf and not found.end.any()
        return
    score, path = best
    starts, ends = runs_of(path, CLASSES - 1)
    count = len(labels)
    np.testing.assert_allclose(found.path_log_probs, score, atol=TOLERANCE * frames)
    assert found.first[:count].tolist() == starts and found.end[:count].tolist() == ends
    means = [log_probs[a:b, c].mean() for a, b, c in zip(starts, ends, labels, strict=True)]
    np.testing.assert_allclose(found.log_probs[:count], means, atol=TOLERANCE)


def test_equal_labels_need_a_blank_between_them():
    lengths = np.array([3, 3, 3], np.int32)
    labels = np.array([[1, 1, 2], [1, 2, 1], [1, 1, 1]], np.int32)
    assert ctc_alignment.frames_needed(labels, lengths).tolist() == [4, 3, 5]
    assert ctc_alignment.frames_needed(labels, lengths - 2).tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def rows():
    """Rows of several blocks of frames, one that does not fit and one without labels."""
    rng = np.random.default_rng(5)
    sizes = [(300, 40), (5, 9), (257, 0), (128, 20), (129, 60)]
    return [(random_log_probs(n, t, 9), rng.integers(0, 8, u)) for n, (t, u) in enumerate(sizes)]


def test_padding_and_neighbours_change_nothing(rows):
    together = batch_of(rows, frames=320, labels=64)
    assert together.fits.tolist() == [True, False, True, True, True]
    for n, (log_probs, labels) in enumerate(rows):
        alone = batch_of([(log_probs, labels)], frames=448, labels=80)
        count = len(labels)
        np.testing.assert_allclose(together.path_log_probs[n], alone.path_log_probs[0], rtol=1e-6)
        for field in ("first", "end", "log_probs"):
            padded, own = getattr(together, field)[n], getattr(alone, field)[0]
            np.testing.assert_array_equal(padded[:count], own[:count])
            assert not padded[count:].any()


def test_long_paths_are_valid(rows):
    log_probs, labels = rows[0]
    found = LabelFrames(*(field[0] for field in batch_of([rows[0]], frames=320, labels=64)))
    path = np.full(len(log_probs), 8)
    for first, end, label in zip(found.first, found.end, labels, strict=False):
        path[first:end] = label
    assert collapse(path, 8) == labels.tolist()
    score = log_probs[np.arange(len(path)), path].sum()
    np.testing.assert_allclose(found.path_log_probs, score, rtol=1e-5)
