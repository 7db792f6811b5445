"""Writes the page: one HTML file with players, that needs no other files and no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechlm2_jax.data.datamodule import DataModule
from speechlm2_jax.data.duplex.contents import DuplexContents
from speechlm2_jax.data.prepare import Prepared
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.evaluation.html_report.page import embed, render, shown_media
from speechlm2_jax.evaluation.results import write_whole
from speechlm2_jax.inspection.facts import (
    Example,
    Padding,
    examples,
    histogram,
    padding,
    plan_table,
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
    sets = [_set(name, datamodule.prepared(name)) for name in datamodule.names]
    rows = [
        row
        for number, name in enumerate(datamodule.names)
        for row in _rows(name, datamodule.prepared(name), tokenizer, count, number)
    ]
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


def _set(name: str, prepared: Prepared) -> dict[str, Any]:
    """Figures, histograms and the plan of one data set."""
    contents, found = prepared.contents, padding(prepared)
    is_duplex = isinstance(contents, DuplexContents)
    seconds = contents.measures.length if is_duplex else contents.lengths()["seconds"]
    return {
        "name": name,
        "figures": _figures(prepared, float(seconds.sum()) / 3600, found),
        "seconds": histogram(seconds, "s") if seconds.any() else None,
        "positions": histogram(contents.measures.positions, "positions"),
        "plan": plan_table(prepared),
        "left_out": [f"{count:,} {cause}" for cause, count in prepared.filtered.items()],
    }


def _figures(prepared: Prepared, hours: float, found: Padding) -> list[dict[str, Any]]:
    """The large numbers at the top."""
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
    name: str, prepared: Prepared, tokenizer: Tokenizer, count: int, number: int
) -> list[dict[str, Any]]:
    """The table rows of one data set, with players."""
    found = list(examples(prepared, tokenizer, count))
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
