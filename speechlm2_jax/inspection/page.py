"""Writes the page: one HTML file with players, that needs no other files and no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.datamodule import DataModule
from speechlm2_jax.data.duplex.contents import DuplexExamples
from speechlm2_jax.data.index.contents import IndexedContents
from speechlm2_jax.data.prepare import Prepared
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.evaluation.html_report.page import embed, render, shown_media
from speechlm2_jax.evaluation.results import write_whole
from speechlm2_jax.inspection.facts import (
    Batch,
    Example,
    Padding,
    examples,
    histogram,
    padding,
    plan_table,
    planned_batches,
)

EXAMPLES = 40
"""Conversations of each data set that are shown."""


def write_page(
    path: Path,
    datamodule: DataModule,
    tokenizer: Tokenizer,
    *,
    title: str,
    count: int = EXAMPLES,
) -> None:
    """Writes what is in each data set: lengths, buckets, padding, and `count` conversations.

    `datamodule` has been set up. Prompts are shown token by token, with the loss mask in colour.
    """
    sets: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name in datamodule.names:
        prepared, batches = datamodule.prepared(name), planned_batches(datamodule, name)
        rows += _rows(
            name, prepared, list(examples(prepared, batches, tokenizer, count)), len(sets)
        )
        sets.append(_set(name, prepared, batches))
    html = render(
        "inspect.html",
        "inspect.css",
        title=f"Data of {title}",
        model=title,
        unit="conversations",
        facts=[f"{len(sets)} data sets" if len(sets) > 1 else sets[0]["name"]],
        figures=[figure for one in sets[:1] for figure in one["figures"]],
        sets=sets,
        groups=[],
        rows=rows,
        menus=_menus(rows),
        record=[],
        not_embedded=False,
        embedded=len(rows),
        totals={},
        count=count,
    )
    write_whole(path, html)


def _set(name: str, prepared: Prepared, batches: Sequence[Batch]) -> dict[str, Any]:
    """Figures, histograms and the plan of one data set; of a large one, of its first batches."""
    contents: Any = prepared.contents
    is_large = isinstance(contents, IndexedContents)
    parts = [batch.measures for batch in batches] if is_large else [contents.measures]
    positions = np.concatenate([part.positions for part in parts])
    if isinstance(contents, DuplexExamples):
        seconds = np.concatenate([part.length for part in parts])
    else:
        samples = np.concatenate([part.samples for part in parts])
        seconds = samples / prepared.config.sample_rate
    of = f" of the first {len(positions):,}" if is_large else ""
    return {
        "name": name,
        "figures": _figures(prepared, float(seconds.mean()), padding(prepared, batches)),
        "seconds": histogram(seconds, "s") if seconds.any() else None,
        "positions": histogram(positions, "positions"),
        "of": of,
        "plan": plan_table(prepared),
        "left_out": [f"{count:,} {cause}" for cause, count in prepared.filtered.items()],
    }


def _figures(prepared: Prepared, mean_s: float, found: Padding) -> list[dict[str, Any]]:
    """The large numbers at the top."""
    hours = mean_s * len(prepared.conversations) / 3600
    over = f"of {found.batches:,} batches"
    plan = prepared.sampler.plan
    values: list[tuple[str, str, str, str]] = [
        ("Conversations", f"{len(prepared.conversations):,}", "", f"{hours:.2f} h of audio"),
        ("Shapes", f"{len(plan.buckets)}", "", "one compiled program each"),
        ("Padding of LLM positions", f"{found.positions:.1%}", "", over),
    ]
    if found.audio is not None:
        values.append(("Padding of audio", f"{found.audio:.1%}", "", over))
    return [
        {"name": name, "value": value, "unit": unit, "note": note, "parts": []}
        for name, value, unit, note in values
    ]


def _rows(
    name: str, prepared: Prepared, found: Sequence[Example], number: int
) -> list[dict[str, Any]]:
    """The table rows of one data set, with players."""
    rate_hz = prepared.config.sample_rate
    media = embed([one.read for one in found], rate_hz)
    longest_s = max((m.duration_s for m in media if m is not None), default=1.0)
    rows: list[dict[str, Any]] = []
    for place, (one, sound) in enumerate(zip(found, media, strict=True)):
        row = _row(name, one, f"{number}-{place}")
        rows.append(row | ({} if sound is None else shown_media(sound, longest_s)))
    return rows


def _row(name: str, one: Example, index: str) -> dict[str, Any]:
    trained = sum(piece.is_trained for piece in one.pieces)
    tags = [name, f"batch {one.batch}", f"bucket {one.bucket}", f"{one.positions} positions"]
    if one.pieces:
        tags.append(f"{len(one.pieces)} tokens, {trained} trained")
    text = "".join(piece.text for piece in one.pieces)
    words = " ".join(spoken for _, spoken in one.texts)
    return {
        "index": index,
        "id": one.id,
        "set": name,
        "bucket": f"{one.bucket}",
        "duration_s": one.seconds,
        "pieces": one.pieces,
        "texts": one.texts,
        "tags": tags,
        "audio": "",
        "search": f"{one.id} {text} {words}".lower(),
    }


def _menus(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Menus over data sets and buckets, where there are several."""
    menus: list[dict[str, Any]] = []
    for kind, label, every in (
        ("set", "Data set", "All sets"),
        ("bucket", "Bucket", "All buckets"),
    ):
        values = sorted({str(row[kind]) for row in rows}, key=lambda v: (len(v), v))
        if len(values) > 1:
            options = [(v, v if kind == "set" else f"bucket {v}") for v in values]
            menus.append({"kind": kind, "label": label, "all": every, "options": options})
    return menus
