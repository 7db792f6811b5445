"""Waveforms as SVG paths, which take the colours of the page."""

import numpy as np
from jaxtyping import Float

COLUMNS_PER_S = 50
MAX_COLUMNS = 3000
HEIGHT = 100
"""Height of the image; silence is in the middle."""


def columns(duration_s: float) -> int:
    """Width of the image of a recording."""
    return int(np.clip(round(duration_s * COLUMNS_PER_S), 1, MAX_COLUMNS))


def waveform_path(wave: Float[np.ndarray, " S"], width: int, loudest: float) -> str:
    """The `d` attribute of an SVG path: the outline of [S] samples in `width` columns.

    A sample of value `loudest` fills the height. Silence is a line.
    """
    edges = np.linspace(0, len(wave), width + 1).astype(int)
    pieces = [wave[a : max(b, a + 1)] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    heights = np.array([[p.max(initial=0.0), p.min(initial=0.0)] for p in pieces])
    middle = HEIGHT / 2
    scaled = middle - np.clip(heights / max(loudest, 1e-4), -1, 1) * (middle - 2)
    top = np.minimum(scaled[:, 0], middle - 0.5)
    bottom = np.maximum(scaled[:, 1], middle + 0.5)
    points = [f"{x},{y:.0f}" for x, y in enumerate(top)]
    points += [f"{x},{y:.0f}" for x, y in reversed(list(enumerate(bottom)))]
    return "M" + "L".join(points) + "Z"
