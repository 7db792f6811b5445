"""Checks recordings before they are trained on: length, sample rate, clipping, silence, copies."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from speechlm2_jax.data.audio import audio_length, read_audio
from speechlm2_jax.data.audio_errors import AudioError

FULL_SCALE = 0.999
"""Magnitude from which a sample counts as clipped."""
CLIPPED_SHARE = 1e-3
"""Share of clipped samples from which a recording is called clipped."""
SILENT_PEAK = 10 ** (-60 / 20)
"""A recording whose peak is below -60 dB of full scale is called silent."""
CHECKED_S = 120.0
"""Seconds from the start of a recording that are decoded; longer ones are rare in a training."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a recording is like."""

    duration_s: float = 0.0
    rate_hz: int = 0
    is_clipped: bool = False
    is_silent: bool = False
    content: str = ""
    """A hash of the samples of its first two minutes, and its length."""
    problem: str | None = None
    """Why it cannot be used; None if it can."""


def check_recording(path: Path) -> Checked:
    """Decodes a recording and measures it. It never raises AudioError."""
    try:
        length = audio_length(path)
        wave = read_audio(path, duration_s=min(CHECKED_S, length.duration_s))
    except AudioError as error:
        return Checked(problem=error.cause)
    magnitude = np.abs(wave)
    return Checked(
        duration_s=length.duration_s,
        rate_hz=length.sample_rate_hz,
        is_clipped=bool(np.mean(magnitude >= FULL_SCALE) >= CLIPPED_SHARE),
        is_silent=bool(magnitude.max(initial=0.0) < SILENT_PEAK),
        content=f"{length.samples}-{xxhash.xxh3_128_hexdigest(wave.tobytes())}",
    )


def check_recordings(paths: Sequence[Path], *, threads: int = 4) -> list[Checked]:
    """Checks all, in order, on some threads, with a progress bar on a terminal."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(check_recording, paths)
        return list(tqdm(found, total=len(paths), desc="checking", unit="file", disable=None))
