"""Batched greedy decoding of transducers by label looping (arXiv 2406.06220).

The outer loop emits one label per sequence and iteration. An inner loop skips blanks with the joint
network alone; then one call of the prediction network advances all sequences. Shapes are static
and no step needs the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
from speechlm2_jax.layers.lstm import LstmState
from speechlm2_jax.pytrees import register_pytree

Score = Callable[[Int[Array, " B"]], Float[Array, "B C"]]
"""Frame of each sequence -> logits of labels, blank and durations there."""
IsLast = Callable[[Int[Array, " B"]], Bool[Array, " B"]]
"""Frame of each sequence -> whether the symbol there skips one more frame."""


class DecodingLimits(TypedDict):
    """Keyword arguments of `decode_greedily`, as a model's `decoding` block sets them."""

    max_symbols: int
    jumps_when_full: bool


@register_pytree
@dataclass(frozen=True, kw_only=True)
class Hypotheses:
    """Labels in time order; only the first `lengths` of each sequence are valid."""

    labels: Int[Array, "B U"]
    frames: Int[Array, "B U"]
    """Encoder frame at which each label was emitted."""
    durations: Int[Array, "B U"]
    """Duration of each label in frames (TDT); 0 for RNN-T."""
    lengths: Int[Array, " B"]
    log_probs: Float[Array, "B U"] | None = None
    """Log-probability of each label among labels and blank; None unless it is kept."""


@register_pytree
@dataclass(frozen=True, kw_only=True)
class _Search:
    """State of the inner loop: where each sequence searches, and its last label or blank."""

    frame: Int[Array, " B"]
    label: Int[Array, " B"]
    duration: Int[Array, " B"]
    is_seeking: Bool[Array, " B"]


@register_pytree
@dataclass(frozen=True, kw_only=True)
class _DecodingState:
    """State of the outer loop: hypotheses so far, and the prediction network after them."""

    hypotheses: Hypotheses
    frame: Int[Array, " B"]
    last_frame: Int[Array, " B"]
    repeats: Int[Array, " B"]
    """Labels emitted at `last_frame`."""
    predicted: Float[Array, "B J"]
    state: LstmState

    def symbols_at(self, frame: Int[Array, " B"]) -> Int[Array, " B"]:
        """Number of the next symbol at `frame`, from 1."""
        return jnp.where(frame == self.last_frame, self.repeats, 0) + 1


def decode_greedily(
    network: TransducerNetwork,
    frames: Float[Array, "B T D"],
    lengths: Int[Array, " B"],
    *,
    max_symbols: int,
    jumps_when_full: bool = False,
    keeps_log_probs: bool = False,
) -> Hypotheses:
    """Emits the best label or blank at each step, at most `max_symbols` labels per frame.

    `jumps_when_full`: after symbol number `max_symbols` at a frame (label or blank), a TDT model
    skips one more frame, even if its duration advances anyway. So does NeMo's strategy `greedy`;
    `greedy_batch` does not. `keeps_log_probs` runs the joint network once more for each label.
    """
    config, joint = network.transducer, network.joint
    jumps = jumps_when_full and bool(config.durations)
    encoded = joint.frames(frames)

    def score_after(decoding: _DecodingState, frame: Int[Array, " B"]) -> Float[Array, "B C"]:
        last = jnp.minimum(frame, encoded.shape[1] - 1)
        here = jnp.take_along_axis(encoded, last[:, None, None], axis=1)[:, 0]
        return joint.score(here, decoding.predicted)

    def find(decoding: _DecodingState) -> _Search:
        def is_last(frame: Int[Array, " B"]) -> Bool[Array, " B"]:
            return jumps & (decoding.symbols_at(frame) >= max_symbols)

        score = partial(score_after, decoding)
        return _next_label(score, is_last, decoding.frame, lengths, config)

    def next_symbol(decoding: _DecodingState) -> _DecodingState:
        search = find(decoding)
        is_label = (decoding.frame < lengths) & (search.label != config.blank)
        predicted, state = _predict(network, search.label, decoding.state)
        keep = is_label[:, None]
        repeats = decoding.symbols_at(search.frame)
        is_full = is_label & (repeats >= max_symbols)
        must_advance = is_full if jumps else is_full & (search.duration == 0)
        log_prob = None
        if keeps_log_probs:
            log_prob = _log_prob(score_after(decoding, search.frame), search.label, config)
        return _DecodingState(
            hypotheses=_append(decoding.hypotheses, search, is_label, log_prob),
            frame=search.frame + jnp.where(is_label, search.duration, 0) + must_advance,
            last_frame=jnp.where(is_label, search.frame, decoding.last_frame),
            repeats=jnp.where(is_label, repeats, decoding.repeats),
            predicted=jnp.where(keep, predicted, decoding.predicted),
            state=jax.tree.map(
                lambda new, old: jnp.where(keep[None], new, old), state, decoding.state
            ),
        )

    start = _start(network, frames.shape[0], frames.shape[1] * max_symbols, keeps_log_probs)
    return jax.lax.while_loop(lambda p: jnp.any(p.frame < lengths), next_symbol, start).hypotheses


def _start(
    network: TransducerNetwork, batch: int, size: int, keeps_log_probs: bool
) -> _DecodingState:
    blanks = jnp.full(batch, network.transducer.blank, jnp.int32)
    predicted, state = _predict(network, blanks, network.prediction.initial_state(batch))
    zeros, table = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, size), jnp.int32)
    return _DecodingState(
        hypotheses=Hypotheses(
            labels=table,
            frames=table,
            durations=table,
            lengths=zeros,
            log_probs=jnp.zeros(table.shape) if keeps_log_probs else None,
        ),
        frame=zeros,
        last_frame=zeros - 1,
        repeats=zeros,
        predicted=predicted,
        state=state,
    )


def _predict(
    network: TransducerNetwork, labels: Int[Array, " B"], state: LstmState
) -> tuple[Float[Array, "B J"], LstmState]:
    """Advances the prediction network by one label, and projects its output for the joint."""
    output, state = network.prediction.step(labels, state)
    return network.joint.labels(output), state


def _next_label(
    score: Score,
    is_last: IsLast,
    frame: Int[Array, " B"],
    lengths: Int[Array, " B"],
    config: TransducerConfig,
) -> _Search:
    """Skips blanks until each sequence has a label, or ends (then its label is the blank)."""

    def skip_blank(search: _Search) -> _Search:
        label, duration = _best(score(search.frame), config)
        is_blank = label == config.blank
        # a blank always advances
        jump = jnp.maximum(duration, 1) + (is_last(search.frame) & (duration > 0))
        skipped = jnp.where(search.is_seeking & is_blank, jump, 0)
        return _Search(
            frame=search.frame + skipped,
            label=jnp.where(search.is_seeking, label, search.label),
            duration=jnp.where(search.is_seeking, duration, search.duration),
            is_seeking=search.is_seeking & is_blank & (search.frame + skipped < lengths),
        )

    blanks = jnp.full(frame.shape, config.blank, jnp.int32)
    start = _Search(
        frame=frame, label=blanks, duration=jnp.zeros_like(frame), is_seeking=frame < lengths
    )
    return jax.lax.while_loop(lambda search: jnp.any(search.is_seeking), skip_blank, start)


def _best(
    logits: Float[Array, "B C"], config: TransducerConfig
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Returns the best label or blank, and its duration in frames."""
    classes = config.blank + 1
    label = jnp.argmax(logits[:, :classes], axis=-1).astype(jnp.int32)
    if not config.durations:
        return label, (label == config.blank).astype(jnp.int32)
    best = jnp.argmax(logits[:, classes:], axis=-1)
    return label, jnp.asarray(config.durations, jnp.int32)[best]


def _log_prob(
    logits: Float[Array, "B C"], label: Int[Array, " B"], config: TransducerConfig
) -> Float[Array, " B"]:
    """The log-probability of each label among labels and blank."""
    log_probs = jax.nn.log_softmax(logits[:, : config.blank + 1].astype(jnp.float32))
    return jnp.take_along_axis(log_probs, label[:, None], axis=1)[:, 0]


def _append(
    hypotheses: Hypotheses,
    search: _Search,
    is_label: Bool[Array, " B"],
    log_prob: Float[Array, " B"] | None,
) -> Hypotheses:
    """Appends the new labels where `is_label`."""
    sequence = jnp.arange(is_label.shape[0])
    out_of_range = hypotheses.labels.shape[1]  # a write there is dropped
    position = jnp.where(is_label, hypotheses.lengths, out_of_range)

    def write(table: Array, values: Array) -> Array:
        return table.at[sequence, position].set(values, mode="drop")

    log_probs = hypotheses.log_probs
    if log_probs is not None and log_prob is not None:
        log_probs = write(log_probs, log_prob)

    return Hypotheses(
        labels=write(hypotheses.labels, search.label),
        frames=write(hypotheses.frames, search.frame),
        durations=write(hypotheses.durations, search.duration),
        lengths=hypotheses.lengths + is_label,
        log_probs=log_probs,
    )
