"""Recordings of conversations as a batch: checked, and of few shapes."""

from typing import Any

import numpy as np

from speechlm2_jax.data.audio import check_samples
from speechlm2_jax.inference.audio_inputs import as_float
from speechlm2_jax.inference.padding import SAMPLE_STEP, round_up


def as_batch(signal: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checks what a user gives: float samples [B, S], and how many each row has.

    Raises ValueError for shapes that are no batch, for integers, and for NaN or infinite samples.
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


def padded(audio: np.ndarray, lengths: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds rows and samples up to few sizes, so that few programs are compiled."""
    rows = -(-round_up(max(len(audio), 1), 1) // groups) * groups
    samples = round_up(int(lengths.max(initial=1)), SAMPLE_STEP)
    whole = np.zeros((rows, samples), np.float32)
    for row, (wave, n) in enumerate(zip(audio, lengths.tolist(), strict=True)):
        whole[row, :n] = wave[:n]
    return whole, fitted(lengths, rows)


def fitted(lengths: np.ndarray, rows: int) -> np.ndarray:
    """Lengths of as many rows; those that are added have none."""
    return np.pad(np.asarray(lengths, np.int32), (0, rows - len(lengths)))
