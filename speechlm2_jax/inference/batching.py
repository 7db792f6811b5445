"""Batches of recordings for duplex inference: checked, and padded to few shapes."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int32

from speechlm2_jax.data.audio import check_samples
from speechlm2_jax.inference.audio_inputs import as_float
from speechlm2_jax.inference.padding import SAMPLE_STEP, round_up


def check_batch(
    signal: Any, lengths: Any
) -> tuple[Float[np.ndarray, "B S"], Int32[np.ndarray, " B"]]:
    """Checks a user's recordings: float samples [B, S], and the length of each.

    Raises ValueError for other shapes, for integers, and for NaN or infinite samples.
    """
    audio, counts = np.asarray(signal), np.asarray(lengths, np.int32)
    if audio.ndim != 2 or counts.shape != audio.shape[:1]:
        raise ValueError(
            f"input_signal must be [B, S] and input_signal_lens [B], not {audio.shape} and "
            f"{counts.shape}"
        )
    if counts.size and (counts.min() < 0 or counts.max() > audio.shape[1]):
        raise ValueError(f"input_signal_lens must lie between 0 and {audio.shape[1]} samples")
    audio = as_float(audio, "input_signal")
    for row, count in enumerate(counts.tolist()):
        if count:
            check_samples(audio[row, :count], f"input_signal, row {row}")
    return audio, counts


def pad_to_static_shape(
    audio: Float[np.ndarray, "B S"], lengths: Int32[np.ndarray, " B"], groups: int
) -> tuple[Float[np.ndarray, "R U"], Int32[np.ndarray, " R"]]:
    """Rounds batch size and samples up, so that few programs are compiled.

    The batch size is a multiple of `groups`, the number of data-parallel shards.
    """
    rows = -(-round_up(max(len(audio), 1), 1) // groups) * groups
    samples = round_up(int(lengths.max(initial=1)), SAMPLE_STEP)
    whole = np.zeros((rows, samples), np.float32)
    for row, (wave, n) in enumerate(zip(audio, lengths.tolist(), strict=True)):
        whole[row, :n] = wave[:n]
    return whole, pad_lengths(lengths, rows)


def pad_lengths(lengths: Int32[np.ndarray, " B"], rows: int) -> Int32[np.ndarray, " R"]:
    """Lengths of `rows` rows; padding rows have length 0."""
    return np.pad(np.asarray(lengths, np.int32), (0, rows - len(lengths)))
