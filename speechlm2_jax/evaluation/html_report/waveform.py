"""A recording as an outline that takes the page's own colours: an SVG path."""

import numpy as np
from jaxtyping import Float

COLUMNS_PER_S = 50
MAX_COLUMNS = 3000
HEIGHT = 100
"""Of the picture; the middle is silence."""


def columns(duration_s: float) -> int:
    """The width of a recording's picture."""
    return int(np.clip(round(duration_s * COLUMNS_PER_S), 1, MAX_COLUMNS))


def waveform_path(wave: Float[np.ndarray, " S"], width: int, loudest: float) -> str:
    """The `d` of a path: the outline of [S] samples in `width` columns.

    `loudest` is the sample that fills the height. Silence is a line.
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
