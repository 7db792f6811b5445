"""Greedy decoding of transducers equals a plain loop over labels and frames."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.asr.greedy import decode_greedily
from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.settings import build

BLANK, WIDTH, STEPS = 4, 8, 12
LENGTHS = (12, 5, 1, 0)


@cache
def make(durations):
    """A random network, and its step: label, state, frames -> best labels, durations, state."""
    config = build(
        TransducerConfig,
        {
            "preprocessor": {"features": 16, "window_size": 0.025},
            "encoder": {"feat_in": 16, "n_layers": 1, "d_model": WIDTH, "n_heads": 2},
            "decoder": {"vocab_size": BLANK, "prednet": {"pred_hidden": 6, "pred_rnn_layers": 2}},
            "joint": {
                "num_classes": BLANK,
                "num_extra_outputs": len(durations),
                "jointnet": {
                    "encoder_hidden": WIDTH,
                    "pred_hidden": 6,
                    "joint_hidden": 5,
                    "activation": "tanh",
                },
            },
            "durations": durations,
        },
    )
    module = abstract(lambda rngs: TransducerNetwork(config, rngs=rngs))
    rng = np.random.default_rng(3)
    variables = {
        path: jnp.asarray(rng.normal(size=info.shape), jnp.float32)
        for path, info in describe(module).items()
    }
    bias = variables["joint.output.bias"]
    variables["joint.output.bias"] = bias.at[BLANK].add(4.0)  # so that blanks occur
    network = merge(split(module)[0], variables)

    @jax.jit
    def step(label, state, frames):
        output, state = network.prediction.step(label[None], state)
        logits = network.joint(frames[None], output[:, None])[0, :, 0]
        return jnp.argmax(logits[:, : BLANK + 1], -1), logits[:, BLANK + 1 :], state

    return network, step


def by_hand(network, step, frames, length, max_symbols, jumps=False):
    """One sequence, one label or blank at a time; with `jumps` as NeMo's `greedy` does TDT."""
    durations = network.transducer.durations
    state = network.prediction.initial_state(1)
    labels, lengths, state = step(jnp.array(BLANK), state, frames)
    found, frame, here = [], 0, 0
    while frame < length:
        label = int(labels[frame])
        is_blank = label == BLANK
        skip = durations[int(np.argmax(lengths[frame]))] if durations else int(is_blank)
        if is_blank:
            is_last = jumps and skip > 0 and here + 1 == max_symbols
            frame, here = frame + max(skip, 1) + is_last, 0
            continue
        found.append((label, frame, skip))
        labels, lengths, state = step(jnp.array(label), state, frames)
        here += 1
        if skip:
            frame, here = frame + skip + (jumps and here == max_symbols), 0
        elif here == max_symbols:
            frame, here = frame + 1, 0
    return found


def hypotheses(network, frames, lengths, **limits):
    """Per sequence: (label, frame, duration) of each label found."""
    decode = jax.jit(lambda x: decode_greedily(network, x, jnp.array(lengths), **limits))
    found = decode(frames)
    columns = [np.asarray(c) for c in (found.labels, found.frames, found.durations)]
    counts = found.lengths.tolist()
    return [
        list(zip(*(c[row, :n].tolist() for c in columns), strict=True))
        for row, n in enumerate(counts)
    ]


@pytest.mark.parametrize("max_symbols", [1, 2])
def test_a_full_frame_costs_a_tdt_model_one_more_where_nemo_counts_so(max_symbols):
    network, step = make((0, 1, 2))
    frames = jax.random.normal(jax.random.key(1), (32, STEPS, WIDTH))
    limits = {"max_symbols": max_symbols, "jumps_when_full": True}
    found = hypotheses(network, frames, [STEPS] * 32, **limits)
    assert found == [by_hand(network, step, row, STEPS, max_symbols, True) for row in frames]
    plain = hypotheses(network, frames, [STEPS] * 32, max_symbols=max_symbols)
    assert any(found) and (found != plain or max_symbols > 1), "the case must show it"


@pytest.mark.parametrize("durations", [(), (0, 1, 2)])
@pytest.mark.parametrize("max_symbols", [1, 3])
def test_a_batch_decodes_as_each_sequence_by_itself(durations, max_symbols):
    network, step = make(durations)
    frames = jax.random.normal(jax.random.key(0), (len(LENGTHS), STEPS, WIDTH))
    decode = jax.jit(
        lambda x: decode_greedily(network, x, jnp.array(LENGTHS), max_symbols=max_symbols)
    )
    found = decode(frames)
    n_labels, n_blanks = 0, 0
    for row, length in enumerate(LENGTHS):
        expected = by_hand(network, step, frames[row], length, max_symbols)
        count = int(found.lengths[row])
        columns = (found.labels, found.frames, found.durations)
        rows = zip(*(np.asarray(c[row, :count]).tolist() for c in columns), strict=True)
        assert list(rows) == expected
        n_labels += count
        n_blanks += length - len(set(found.frames[row, :count].tolist()))
    assert n_labels > 1 and n_blanks > 3, "the case must have both"
    assert found.labels.shape == (len(LENGTHS), STEPS * max_symbols)


@pytest.mark.parametrize("durations", [(), (0, 1, 2)])
def test_log_probabilities_are_those_of_the_joint_network(durations):
    network, _ = make(durations)
    frames = jax.random.normal(jax.random.key(0), (len(LENGTHS), STEPS, WIDTH))
    lengths = jnp.array(LENGTHS)

    @jax.jit
    def decode(x):
        return decode_greedily(network, x, lengths, max_symbols=3, keeps_log_probs=True)

    @jax.jit
    def log_probs_after(label, state, x):
        output, state = network.prediction.step(label[None], state)
        logits = network.joint(x[None], output[:, None])[0, :, 0]
        return jax.nn.log_softmax(logits[:, : BLANK + 1]), state

    found = decode(frames)
    for row in range(len(LENGTHS)):
        label, state = jnp.array(BLANK), network.prediction.initial_state(1)
        for n in range(int(found.lengths[row])):
            expected, state = log_probs_after(label, state, frames[row])
            label = found.labels[row, n]
            own = expected[found.frames[row, n], label]
            np.testing.assert_allclose(found.log_probs[row, n], own, atol=1e-5)
        assert not found.log_probs[row, int(found.lengths[row]) :].any()
    assert int(found.lengths.sum()) > 1
