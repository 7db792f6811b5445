"""One HTML page that compares runs: a table, and a chart of every metric. It needs no network."""

import html
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax.evaluation.results import write_whole
from speechlm2_jax.inspection.runs import RunRecord, metrics_of, number, short_names, table

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 30
MOST_POINTS = 400
"""Points of a curve; longer ones show means of neighbouring points."""
COLORS = 8
"""Colours of curves; later runs are dashed in the same ones."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d7dce3; --back: #fff;
  --c0: #2563eb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #c2255c; --c5: #0b7285;
  --c6: #846200; --c7: #495057; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a2b3; --line: #384150;
  --back: #14181f; --c0: #74a7ff; --c1: #ff9d66; --c2: #6fd287; --c3: #d89bea; --c4: #ff8fb3;
  --c5: #62d0e3; --c6: #e0c35a; --c7: #b6bec9; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 0 0 .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
.charts { display: grid; gap: 1.2rem; margin-top: 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; } svg text { fill: var(--soft);
  font-size: 12px; } .axis { stroke: var(--line); fill: none; }
polyline { fill: none; stroke-width: 1.6; } .key { display: inline-block; width: 1.4em;
  height: 0; border-top: 3px solid; margin-right: .5em; vertical-align: middle; }
"""


def write_runs_page(path: Path, runs: Sequence[RunRecord]) -> None:
    """Writes the page; the file is there whole or not at all."""
    names = short_names(runs)
    charts = "".join(_chart(metric, runs, names) for metric in metrics_of(runs))
    write_whole(
        path,
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "style-src 'unsafe-inline'\">"
        f"<title>{len(runs)} runs</title><style>{_STYLE}</style></head><body>"
        f"<h1>{len(runs)} run{'s' if len(runs) > 1 else ''}</h1>{_table(runs)}"
        f"<div class='charts'>{charts}</div></body></html>\n",
    )


def _table(runs: Sequence[RunRecord]) -> str:
    head, *rows = table(runs)
    lines = ["<tr>" + "".join(f"<th scope='col'>{_escape(cell)}</th>" for cell in head) + "</tr>"]
    for index, row in enumerate(rows):
        first = f"<td><span class='key' style='{_stroke(index, 'border')}'></span>"
        cells = [f"{first}{_escape(row[0])}</td>", *(f"<td>{_escape(c)}</td>" for c in row[1:])]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _chart(metric: str, runs: Sequence[RunRecord], names: dict[Path, str]) -> str:
    """One metric over the steps, a curve for each run that has it."""
    curves = {i: thin(run.curves[metric]) for i, run in enumerate(runs) if metric in run.curves}
    points = [point for curve in curves.values() for point in curve]
    last_step = max(step for step, _ in points) or 1
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = high - low or abs(high) or 1.0
    low, high = (low, high) if high > low else (low - span / 2, low + span / 2)

    def at(step: float, value: float) -> str:
        x = LEFT + step / last_step * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for index, curve in curves.items():
        label = f"{names[runs[index].path]}: last {number(curve[-1][1])}"
        line = " ".join(at(*point) for point in curve)
        mark = at(*curve[-1]).split(",")
        drawn.append(
            f"<g><title>{_escape(label)}</title>"
            f"<polyline points='{line}' style='{_stroke(index, 'stroke')}'/>"
            f"<circle cx='{mark[0]}' cy='{mark[1]}' r='3' style='fill:var(--c{index % COLORS})'/>"
            "</g>"
        )
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    ticks = "".join(
        f"<text x='{LEFT - 6}' y='{float(at(0, value).split(',')[1]) + 4:.1f}' "
        f"text-anchor='end'>{number(value)}</text>"
        for value in (low, (low + high) / 2, high)
    )
    return (
        f"<figure><h2>{_escape(metric)}</h2><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{_escape(metric)} over steps'>"
        f"<path class='axis' d='M{LEFT},{TOP}V{bottom}H{right}'/>{ticks}"
        f"<text x='{LEFT}' y='{HEIGHT - 10}'>0</text><text x='{right}' y='{HEIGHT - 10}' "
        f"text-anchor='end'>step {last_step:g}</text>{''.join(drawn)}</svg></figure>"
    )


def thin(curve: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of as many neighbours as that takes."""
    size = -(-len(curve) // MOST_POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [
        (sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group))
        for group in groups
    ]


def _stroke(index: int, kind: str) -> str:
    """The style of a run's curve, and of its key."""
    dashed = index >= COLORS
    if kind == "border":
        return f"border-color:var(--c{index % COLORS})" + (";border-style:dashed" if dashed else "")
    return f"stroke:var(--c{index % COLORS})" + (";stroke-dasharray:5 4" if dashed else "")


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
