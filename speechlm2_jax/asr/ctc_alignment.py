"""Forced alignment: which frames each label of a known text takes, by Viterbi search over CTC.

The lattice is that of Graves et al. (2006): a blank before, between and after the labels may last
any number of frames, or none, except between two equal labels. The search is the one that CTC
segmentation (Kürzinger et al. 2020) runs. It walks forwards over the frames and keeps the scores
before every block of BLOCK_FRAMES; then it walks backwards over the blocks, runs each again and
follows the best path through it. So memory grows with the square root of what a table of all
choices would take, and an hour of audio can be aligned at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK_FRAMES = 128
"""Frames between two kept scores. An hour has 45,000 frames of 80 ms."""
_NEVER = -1e30
"""Score of what cannot be: finite, so that no difference of two is NaN."""
_STAY, _FROM_BLANK, _FROM_LABEL = range(3)
"""Where a label's state comes from: itself, the blank before it, the label before it."""
_BLANK_FROM_LABEL = 4
"""Added to a choice where the blank before that label comes from the label before, not itself."""


class LabelFrames(NamedTuple):
    """The frames of each label on the most likely path, and how likely it is."""

    first: Int[Array, "B U"]
    """First frame of each label."""
    end: Int[Array, "B U"]
    """Frame after its last one. `first` and `end` are 0 for padding, and where nothing fits."""
    log_probs: Float[Array, "B U"]
    """Mean log-probability of the label over its frames, in nats."""
    path_log_probs: Float[Array, " B"]
    """Log-probability of the whole path, blanks included, in nats."""
    fits: Bool[Array, " B"]
    """False where the frames are too few for the labels: then there is no path."""


class _Scores(NamedTuple):
    """Log-probability of the best path that ends in each state."""

    blank: Float[Array, "B U1"]
    """In the blank before label u, or after the last one."""
    label: Float[Array, "B U"]


class _Place(NamedTuple):
    """Where each path is: in label `index`, or in the blank before it."""

    index: Int[Array, " B"]
    is_label: Bool[Array, " B"]


def frames_needed(labels: Int[Array, "B U"], label_lengths: Int[Array, " B"]) -> Int[Array, " B"]:
    """Counts the frames that a path needs: one a label, and a blank between two equal ones."""
    is_pair = jnp.arange(1, labels.shape[1])[None] < label_lengths[:, None]
    return label_lengths + jnp.sum((labels[:, 1:] == labels[:, :-1]) & is_pair, axis=1)


def align_labels(
    log_probs: Float[Array, "B T C"],
    frame_lengths: Int[Array, " B"],
    labels: Int[Array, "B U"],
    label_lengths: Int[Array, " B"],
) -> LabelFrames:
    """Finds the most likely path of each sequence's labels through its frames.

    `log_probs` are those of CTC, the blank last. Lengths are arguments: one program serves every
    sequence of a shape, and padding changes nothing. Pure.
    """
    frames = -(-log_probs.shape[1] // BLOCK_FRAMES) * BLOCK_FRAMES
    padded = jnp.pad(
        log_probs.astype(jnp.float32), ((0, 0), (0, frames - log_probs.shape[1]), (0, 0))
    )
    blocks = jnp.moveaxis(padded, 1, 0).reshape(-1, BLOCK_FRAMES, *padded.shape[::2])
    times = jnp.arange(frames).reshape(-1, BLOCK_FRAMES)
    walk = partial(_forward, labels=labels, frame_lengths=frame_lengths)

    def forward(scores: _Scores, block: tuple[Array, Array]) -> tuple[_Scores, _Scores]:
        return jax.lax.scan(lambda s, x: (walk(s, x)[0], None), scores, block)[0], scores

    def backward(place: _Place, block: tuple[_Scores, Array, Array]) -> tuple[_Place, Array]:
        scores, *inputs = block
        choices = jax.lax.scan(walk, scores, (inputs[0], inputs[1]))[1]
        return jax.lax.scan(_backward, place, choices, reverse=True)

    scores, kept = jax.lax.scan(forward, _start(labels), (times, blocks))
    place, best = _end(scores, label_lengths)
    _, path = jax.lax.scan(backward, place, (kept, times, blocks), reverse=True)
    path = path.reshape(frames, -1).T[:, : log_probs.shape[1]]  # [B, T]
    fits = frames_needed(labels, label_lengths) <= frame_lengths
    is_frame = jnp.arange(path.shape[1])[None] < frame_lengths[:, None]
    path = jnp.where(is_frame & fits[:, None], path, -1)
    return _read(path, log_probs, labels)._replace(
        path_log_probs=jnp.where(fits, best, -jnp.inf), fits=fits
    )


def _start(labels: Int[Array, "B U"]) -> _Scores:
    """The scores before the first frame: in the first blank, for sure."""
    label = jnp.full(labels.shape, _NEVER)
    return _Scores(jnp.pad(label, ((0, 0), (1, 0)), constant_values=0.0), label)


def _forward(
    scores: _Scores,
    inputs: tuple[Int[Array, ""], Float[Array, "B C"]],
    *,
    labels: Int[Array, "B U"],
    frame_lengths: Int[Array, " B"],
) -> tuple[_Scores, Int[Array, "B U1"]]:
    """Adds one frame. Returns the choices that led to each state too."""
    time, log_probs = inputs
    before = jnp.pad(scores.label, ((0, 0), (1, 0)), constant_values=_NEVER)  # [B, U1]
    is_new = jnp.pad(labels[:, 1:] != labels[:, :-1], ((0, 0), (1, 0)))
    from_label = jnp.where(is_new, before[:, :-1], _NEVER)
    entered = jnp.stack([scores.label, scores.blank[:, :-1], from_label])
    label = jnp.max(entered, axis=0) + jnp.take_along_axis(log_probs, labels, axis=1)
    blank = jnp.maximum(scores.blank, before) + log_probs[:, -1:]
    choice = jnp.pad(jnp.argmax(entered, axis=0), ((0, 0), (0, 1)))
    choice += jnp.where(before > scores.blank, _BLANK_FROM_LABEL, 0)
    is_frame = (time < frame_lengths)[:, None]  # what follows the last frame changes nothing
    kept = _Scores(
        jnp.where(is_frame, blank, scores.blank), jnp.where(is_frame, label, scores.label)
    )
    return kept, jnp.where(is_frame, choice, _STAY).astype(jnp.int8)


def _end(scores: _Scores, label_lengths: Int[Array, " B"]) -> tuple[_Place, Float[Array, " B"]]:
    """The better of the last label and the blank after it, and its score."""
    last = jnp.maximum(label_lengths - 1, 0)
    label = jnp.take_along_axis(scores.label, last[:, None], axis=1)[:, 0]
    label = jnp.where(label_lengths > 0, label, _NEVER)
    blank = jnp.take_along_axis(scores.blank, label_lengths[:, None], axis=1)[:, 0]
    is_label = label > blank
    place = _Place(jnp.where(is_label, last, label_lengths), is_label)
    return place, jnp.maximum(label, blank)


def _backward(place: _Place, choices: Int[Array, "B U1"]) -> tuple[_Place, Int[Array, " B"]]:
    """Steps back over one frame. Returns the label that the path has there, -1 for the blank."""
    here = jnp.take_along_axis(choices, place.index[:, None], axis=1)[:, 0]
    of_label, of_blank = here % _BLANK_FROM_LABEL, here >= _BLANK_FROM_LABEL
    moves = jnp.where(place.is_label, of_label == _FROM_LABEL, of_blank)
    is_label = jnp.where(place.is_label, of_label != _FROM_BLANK, of_blank)
    before = _Place(place.index - moves, is_label)
    return before, jnp.where(place.is_label, place.index, -1)


def _read(
    path: Int[Array, "B T"], log_probs: Float[Array, "B T C"], labels: Int[Array, "B U"]
) -> LabelFrames:
    """The first and last frame of each label of a path, and its mean log-probability."""
    rows, times = jnp.arange(len(path))[:, None], jnp.arange(path.shape[1])[None]
    at = jnp.where(path < 0, labels.shape[1], path)  # a write beyond the labels is dropped
    kind = jnp.take_along_axis(labels, jnp.maximum(path, 0), axis=1)
    own = jnp.take_along_axis(log_probs, kind[..., None], axis=2)[..., 0]
    none = jnp.zeros(labels.shape, jnp.int32)
    count = none.at[rows, at].add(1, mode="drop")
    first = jnp.full(labels.shape, path.shape[1]).at[rows, at].min(times, mode="drop")
    total = jnp.zeros(labels.shape).at[rows, at].add(own, mode="drop")
    is_there = count > 0
    first = jnp.where(is_there, first, 0).astype(jnp.int32)
    return LabelFrames(
        first=first,
        end=first + count,
        log_probs=total / jnp.maximum(count, 1),
        path_log_probs=jnp.zeros(len(path)),
        fits=jnp.ones(len(path), bool),
    )
