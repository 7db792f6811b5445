"""Recordings of known length."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    """Writes a 16 kHz file of so many seconds below tmp_path."""

    def write(name: str, seconds: float, rate_hz: int = 16_000) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = np.sin(np.arange(round(seconds * rate_hz)) / 20).astype(np.float32) / 4
        soundfile.write(str(path), samples, rate_hz)
        return path

    return write
