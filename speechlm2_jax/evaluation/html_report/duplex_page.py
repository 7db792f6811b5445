"""The HTML report of a duplex model: user and agent of each conversation on one time axis.

Uses script and style of page.py; the template of the rows is assets/duplex.html.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio import AudioError, read_audio, sinc_resample
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.evaluation.duplex.inputs import Dialogue
from speechlm2_jax.evaluation.duplex.results import (
    SCORES,
    DialogueResult,
    DuplexEvaluation,
    format_both,
    format_score,
)
from speechlm2_jax.evaluation.duplex.turns import TranscribedTurn
from speechlm2_jax.evaluation.html_report.figures import speed_figure
from speechlm2_jax.evaluation.html_report.page import (
    TICK_STEPS_S,
    audio_uri,
    facts,
    record_lines,
    render,
    ticks,
)
from speechlm2_jax.evaluation.html_report.waveform import HEIGHT, columns, waveform_path
from speechlm2_jax.evaluation.metrics.alignment import align_words
from speechlm2_jax.evaluation.metrics.turn_taking import TurnMark
from speechlm2_jax.evaluation.metrics.wer import WordErrors, text_normalizer
from speechlm2_jax.evaluation.results import write_whole

WORKERS = 2
PX_PER_S = 72
"""Minimum width of a second; long conversations scroll."""
LETTER_PX = 7.2
"""Approximate width of a letter in a mark."""
LEAST_BOX_S = 0.2
LEAST_TICK_PX = 56
MARKS: Mapping[str, tuple[str, str]] = {
    "response": ("{:.2f} s", "good"),
    "unanswered": ("no response", "bad"),
    "barge_in": ("barge-in: stops after {:.2f} s", "good"),
    "talked_over": ("barge-in: continues for {:.2f} s", "bad"),
}
"""Label and grade of each kind of mark."""


@dataclass(frozen=True, kw_only=True)
class _Media:
    """Waveforms and embedded audio of a conversation."""

    duration_s: float
    columns: int
    paths: Mapping[str, str]
    players: Sequence[tuple[str, str]]
    """(name, `data:` URI)."""


def write_duplex_page(
    path: Path,
    result: DuplexEvaluation,
    dialogues: Sequence[Dialogue],
    dataset: DuplexS2SDataset,
    record: Mapping[str, Any],
    *,
    media_rows: int,
    normalizer: str | bool | None,
) -> None:
    """Writes the report, worst conversation first.

    Args:
        path: the HTML file.
        result: the results, in the order of `dialogues`.
        dialogues: the inputs; the recordings of the worst ones are read again.
        dataset: defines the sampling rates of user and agent.
        record: the provenance of the evaluation.
        media_rows: number of conversations with waveforms and audio.
        normalizer: normalizes the texts before they are aligned.
    """
    rows = [_row(i, one, normalizer) for i, one in enumerate(result.results)]
    rows.sort(key=lambda row: (-row["badness"], -row["errors"], row["index"]))
    chosen = [row["index"] for row in rows[:media_rows]]
    with ThreadPoolExecutor(WORKERS) as pool:
        media = pool.map(lambda i: _media(result.results[i], dialogues[i], dataset), chosen)
        for row, found in zip(rows, media, strict=False):
            if found is not None:
                row["stage"] = _stage(result.results[row["index"]], found)
    totals = result.totals()
    model = record["model"]["name"]
    html = render(
        "duplex.html",
        "duplex.css",
        unit="conversations",
        title=f"{model}: {_main_score(totals)}",
        model=model,
        facts=facts(record, _counted(totals)),
        figures=_figures(totals),
        sets=_sets(totals),
        menus=_menus(result),
        rows=rows,
        embedded=sum(bool(row["stage"]) for row in rows),
        not_embedded=len(rows) > media_rows,
        wave_height=HEIGHT,
        record=record_lines(record),
    )
    write_whole(path, html)


# Rows ------------------------------------------------------------------------------------------


def _row(index: int, result: DialogueResult, normalizer: str | bool | None) -> dict[str, Any]:
    errors = result.word_errors(normalizer) if result.error is None else None
    normalize = text_normalizer(normalizer)
    texts = (result.id, result.set_name, result.user_text, result.text, result.pred_text)
    words: Any = ()
    if errors is not None:
        words = align_words(normalize(result.text or ""), normalize(result.pred_text))
    unanswered = sum(mark.kind == "unanswered" for mark in result.marks)
    return {
        "index": index,
        "id": result.id,
        "set": result.set_name,
        "length": result.length,
        "duration_s": result.duration_s,
        "badness": _badness(errors),
        "errors": 0 if errors is None else errors.errors + unanswered,
        "wer": "–" if errors is None or errors.wer is None else f"{errors.wer:.0%}",
        "grade": _grade(errors),
        "words": words,
        "plain": result.pred_text if errors is None and result.error is None else None,
        "asr_text": result.asr_text,
        "problem": f"no response: {result.error}" if result.error else "",
        "tags": _tags(result),
        "search": " ".join([text for text in (*texts, result.asr_text) if text]).lower(),
        "stage": None,
    }


def _badness(errors: WordErrors | None) -> float:
    if errors is None:
        return -1.0
    if errors.wer is None:
        return math.inf if errors.errors else 0.0
    return errors.wer


def _grade(errors: WordErrors | None) -> str:
    if errors is None:
        return ""
    return "right" if not errors.errors else "bad" if _badness(errors) >= 0.5 else "some"


def _tags(result: DialogueResult) -> list[str]:
    tags = [result.set_name, f"{result.duration_s:.2f} s"]
    delays = [mark.seconds for mark in result.marks if mark.kind == "response"]
    if delays:
        tags.append(f"latency {', '.join(f'{delay:.2f}' for delay in delays)} s")
    if result.counts is not None:
        shares = result.counts.scores()
        names = (("txt_token_acc", "text tokens"), ("audio_token_acc", "codes"))
        tags += [f"{name} {shares[key]:.0%}" for key, name in names if key in shares]
    if result.rtf is not None:
        tags.append(f"RTF {result.rtf:.3f}")
    return tags


# The two sides ---------------------------------------------------------------------------------


def _media(result: DialogueResult, dialogue: Dialogue, dataset: DuplexS2SDataset) -> _Media | None:
    """Reads and encodes both sides; None if there is no audio."""
    rate_hz = dataset.target_sample_rate
    if result.error is not None or result.audio is None:
        return None
    try:
        source = dialogue.example(dataset).source_audio
        agent = read_audio(result.audio, sample_rate_hz=rate_hz)
    except AudioError:
        return None
    user = sinc_resample(source, dataset.source_sample_rate, rate_hz)
    both = np.zeros((max(len(user), len(agent), 1), 2), np.float32)
    both[: len(user), 0], both[: len(agent), 1] = user, agent
    duration_s = len(both) / rate_hz
    width = columns(duration_s)
    voices = {"user": both[:, 0], "agent": both[:, 1]}
    return _Media(
        duration_s=duration_s,
        columns=width,
        paths={
            name: waveform_path(wave, width, float(np.abs(wave).max()))
            for name, wave in voices.items()
        },
        players=[
            ("both", audio_uri(both, rate_hz)),
            *((name, audio_uri(wave, rate_hz)) for name, wave in voices.items()),
        ],
    )


def _stage(result: DialogueResult, media: _Media) -> dict[str, Any]:
    """Waveforms, words and marks of a conversation, placed in percent of the time axis."""
    width_px = PX_PER_S * media.duration_s
    step_s = next((s for s in TICK_STEPS_S if s * PX_PER_S >= LEAST_TICK_PX), TICK_STEPS_S[-1])
    lanes = {"user": result.user_turns, "agent": result.agent_turns}
    if any(turn.words for turn in result.reference_turns):
        lanes["should"] = result.reference_turns
    return {
        "duration_s": media.duration_s,
        "width_px": round(width_px),
        "columns": media.columns,
        "paths": media.paths,
        "players": media.players,
        "lanes": {name: _lane(turns, media.duration_s) for name, turns in lanes.items()},
        "marks": [_mark(mark, media.duration_s) for mark in result.marks],
        "ticks": ticks(media.duration_s, step_s),
    }


def _lane(turns: Sequence[TranscribedTurn], duration_s: float) -> dict[str, Any]:
    """Turns as boxes of a CSS grid, with a column between each two successive turn edges."""
    spans = [(t.start_s, max(min(t.end_s, duration_s), t.start_s + LEAST_BOX_S)) for t in turns]
    edges = sorted({0.0, duration_s, *(edge for span in spans for edge in span)})
    place = {edge: line for line, edge in enumerate(edges, 1)}
    widths = [later - earlier for earlier, later in pairwise(edges)]
    return {
        "columns": " ".join(f"minmax(0,{width:.3f}fr)" for width in widths),
        "boxes": [
            {
                "start": place[start_s],
                "end": place[end_s],
                "is_marked": turn.is_marked,
                "title": f"{turn.start_s:.2f} to {turn.end_s:.2f} s",
                "words": [{"text": w.text, "at": f"{w.start_s:.2f}"} for w in turn.words],
            }
            for turn, (start_s, end_s) in zip(turns, spans, strict=True)
        ],
    }


def _mark(mark: TurnMark, duration_s: float) -> dict[str, Any]:
    text, grade = MARKS[mark.kind]
    start_s, end_s = sorted((mark.start_s, mark.end_s))
    return {
        "kind": mark.kind,
        "grade": grade,
        "text": text.format(mark.seconds),
        "left": _percent(start_s, duration_s),
        "width": _percent(min(end_s, duration_s) - start_s, duration_s),
        # a label near the end of the axis is drawn to the left of its mark
        "is_late": (duration_s - start_s) * PX_PER_S < (len(text) + 2) * LETTER_PX,
    }


def _percent(seconds: float, duration_s: float) -> str:
    return f"{100 * max(seconds, 0.0) / duration_s:.2f}"


# Head ------------------------------------------------------------------------------------------


def _main_score(totals: Mapping[str, Any]) -> str:
    scores = totals["scores"]
    keys = ("asr_bleu", "txt_bleu", "empty_text_rate")
    return next(
        (f"{SCORES[k][0]} {format_score(k, scores)}" for k in keys if k in scores), "no responses"
    )


def _counted(totals: Mapping[str, Any]) -> str:
    failed = sum(totals["failed"].values())
    unread = f", {failed} could not be read" if failed else ""
    return f"{totals['conversations']} conversations, {totals['audio_s'] / 60:.1f} min{unread}"


def _figures(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers at the top of the page."""
    scores = totals["scores"]
    found = [
        _figure(scores, "right_text", "Right texts", "conversations without an error"),
        _figure(scores, "txt_bleu", "Text BLEU", "of the agent's text channel"),
        _figure(scores, "asr_bleu", "ASR-BLEU", _together(scores, WER="wer", CER="cer")),
        _figure(
            scores,
            "turn_taking_f1",
            "Turn-taking F1",
            _together(scores, precision="turn_taking_precision", recall="turn_taking_recall"),
        ),
        _figure(
            scores, "turn_taking_latency_median_s", "Latency, median", "user's end to response"
        ),
        _figure(scores, "barge_in_success", "Barge-ins", "given way to within 1.5 s"),
        _figure(
            scores, "txt_token_acc", "Text tokens correct", "free-running, where the target is text"
        ),
        _figure(
            scores,
            "audio_token_acc",
            "Codes correct",
            f"{format_score('audio_token_acc_of_silence', scores)} of a silent agent",
        ),
        _figure(scores, "empty_text_rate", "Empty responses", "without a character"),
    ]
    figures = [figure for figure in found if figure is not None]
    figures += speed_figure(totals)
    return [{"parts": [], **figure} for figure in figures]


def _figure(
    scores: Mapping[str, float | None], key: str, name: str, note: str
) -> dict[str, Any] | None:
    if key not in scores:
        return None
    value, _, unit = format_score(key, scores).partition(" ")
    if value.endswith("%"):
        value, unit = value[:-1], "%"
    return {"name": name, "value": value, "unit": unit, "note": note}


def _together(scores: Mapping[str, float | None], **keys: str) -> str:
    return ", ".join(
        f"{name} {format_score(key, scores)}" for name, key in keys.items() if key in scores
    )


def _sets(totals: Mapping[str, Any]) -> dict[str, Any] | None:
    """All scores: a column per set, and one for their mean if there are several.

    Behind a bar are those of an agent of pads and silence.
    """
    by_set = totals["by_set"]
    keys = list(totals["scores"])
    columns: dict[str, Any] = dict(by_set)
    if len(columns) > 1:
        columns["mean of sets"] = totals
    if not keys:
        return None
    return {
        "names": list(columns),
        "lines": [
            (SCORES[key][0], [format_both(key, found) for found in columns.values()])
            for key in keys
        ],
    }


def _menus(result: DuplexEvaluation) -> list[dict[str, Any]]:
    """Filter menus: set and length."""
    in_order = sorted(result.results, key=lambda a: a.duration_s)
    lengths = list(dict.fromkeys(a.length for a in in_order))
    menus = [
        {"kind": "set", "label": "Set", "all": "All sets", "names": result.set_names},
        {"kind": "length", "label": "Length", "all": "All lengths", "names": lengths},
    ]
    return [
        {**menu, "options": [(name, name) for name in menu["names"]]}
        for menu in menus
        if len(menu["names"]) > 1
    ]
