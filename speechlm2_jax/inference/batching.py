"""Checks batches of recordings for duplex inference, and pads them to one of few shapes."""

import numpy as np
from jaxtyping import Float, Int32

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.data.audio import check_samples
from speechlm2_jax.data.padding import pad_right
from speechlm2_jax.inference.audio_inputs import padded_batch
from speechlm2_jax.inference.padding import SAMPLE_UNIT, round_up


def check_batch(
    signal: ArrayLike, lengths: ArrayLike | None
) -> tuple[Float[np.ndarray, "B S"], Int32[np.ndarray, " B"]]:
    """Checks a user's recordings: float samples [B, S], and the length of each.

    Raises ValueError for other shapes, for integers, and for NaN or infinite samples.
    """
    audio, counts = padded_batch(signal, lengths, ("input_signal", "input_signal_lens"), least=0)
    for row, count in enumerate(counts.tolist()):
        if count:
            check_samples(audio[row, :count], f"input_signal, row {row}")
    return audio, counts


def pad_to_static_shape(
    audio: Float[np.ndarray, "B S"], lengths: Int32[np.ndarray, " B"], groups: int
) -> tuple[Float[np.ndarray, "R U"], Int32[np.ndarray, " R"]]:
    """Pads batch size and samples to rounded sizes, so that few programs are compiled.

    The padded batch size is a multiple of `groups`, the number of data-parallel shards.
    """
    rows = -(-round_up(max(len(audio), 1), 1) // groups) * groups
    samples = round_up(int(lengths.max(initial=1)), SAMPLE_UNIT)
    waves = [wave[:n] for wave, n in zip(audio, lengths.tolist(), strict=True)]
    return pad_right(waves, rows=rows, width=samples)


def pad_lengths(lengths: Int32[np.ndarray, " B"], rows: int) -> Int32[np.ndarray, " R"]:
    """Pads lengths to `rows` elements. Padding has length 0."""
    return np.pad(np.asarray(lengths, np.int32), (0, rows - len(lengths)))
