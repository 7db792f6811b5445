"""The HTML report: one file that needs no other files and no network.

Audio and spectrograms of the worst utterances are embedded as `data:` URIs. Text, style and script
are files in assets/; Jinja escapes every value.
"""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.comparisons import CONTROLS
from speechlm2_jax.evaluation.html_report.figures import figures
from speechlm2_jax.evaluation.html_report.spectrogram import MEL_BINS, RANGE_DB, spectrogram_png
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.metrics.alignment import align_words
from speechlm2_jax.evaluation.metrics.wer import WordErrors, text_normalizer, word_errors
from speechlm2_jax.evaluation.results import Evaluation, Response, ScoredResponse, write_whole
from speechlm2_jax.evaluation.score_table import percent

WORKERS = 4
PICTURE_PX = 480
"""Width of the longest recording's spectrogram."""
UNSEEN = "*unseen*"
"""Value of the voice menu for all unseen voices; page.js uses it too."""
TICK_STEPS_S = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, kw_only=True)
class Media:
    """Embedded media of a recording."""

    audio: str
    spectrogram: str
    """Both as `data:` URIs."""
    duration_s: float


def write_page(
    path: Path,
    result: Evaluation,
    utterances: Sequence[Utterance],
    record: Mapping[str, Any],
    *,
    media_rows: int,
    rate_hz: int,
) -> None:
    """Writes the report, worst utterance first.

    Args:
        path: the HTML file.
        result: the responses, in the order of `utterances`.
        utterances: the inputs; the recordings of the worst ones are read again.
        record: the provenance of the evaluation.
        media_rows: number of utterances with audio and a spectrogram.
        rate_hz: sampling rate of the model and of the embedded audio.
    """
    rows = _rows(result)
    media = embed([utterances[r["index"]].read for r in rows[:media_rows]], rate_hz)
    longest_s = max((m.duration_s for m in media if m is not None), default=1.0)
    for row, found in zip(rows, media, strict=False):
        if found is not None:
            row |= shown_media(found, longest_s)
    html = render(
        "page.html",
        unit="utterances",
        rows=rows,
        embedded=sum(m is not None for m in media),
        not_embedded=len(rows) > media_rows,
        rate_hz=rate_hz,
        mel_bins=MEL_BINS,
        range_db=RANGE_DB,
        **_head(result.totals(), record),
        menus=_menus(result),
    )
    write_whole(path, html)


def audio_uri(wave: Float[np.ndarray, "S *C"], rate_hz: int) -> str:
    """Samples, mono [S] or with C channels, as a `data:` URI of Ogg Vorbis.

    Every browser plays Vorbis. Opus would be half the size, but takes ten times as long to encode.
    """
    import soundfile

    file = io.BytesIO()
    channels = 1 if wave.ndim == 1 else wave.shape[1]
    with soundfile.SoundFile(file, "w", rate_hz, channels, "VORBIS", format="OGG") as ogg:
        for start in range(0, len(wave), rate_hz):  # libvorbis keeps a whole write on its stack
            ogg.write(np.clip(wave[start : start + rate_hz], -1, 1))
    return _uri("audio/ogg", file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def render(template: str, *styles: str, **values: Any) -> str:
    """Renders a template of assets/ with its script, its style and further `styles`."""
    folder = Path(__file__).with_name("assets")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script = (folder / "page.js").read_text("utf-8")
    return environment.get_template(template).render(
        style="".join((folder / name).read_text("utf-8") for name in ("page.css", *styles)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


# Rows ------------------------------------------------------------------------------------------


def _rows(result: Evaluation) -> list[dict[str, Any]]:
    """A table row per response: scored ones worst first, then the others."""
    scored = {id(s.response): s for s in result.scored()}
    rows = [
        _row(index, result, scored.get(id(response)))
        for index, response in enumerate(result.responses)
    ]
    return sorted(rows, key=lambda row: (-row["badness"], -row["errors"], row["index"]))


def _row(index: int, result: Evaluation, scored: ScoredResponse | None) -> dict[str, Any]:
    response = result.responses[index]
    row: dict[str, Any] = {
        "index": index,
        "id": response.id,
        "badness": -1.0,
        "errors": 0,
        "wer": "–",
        "grade": "",
        "counts": "",
        "words": (),
        "plain": None if response.error else response.pred_text,
        "problem": f"no response: {response.error}" if response.error else "",
        "encoder_text": None,
        "raw": None,
        "duration_s": response.duration_s,
        "length": response.length,
        "voice": response.voice or "",
        "is_unseen": response.is_unseen,
        "seen": _seen(response),
        "controls": [(CONTROLS[n], text) for n, text in response.controls.items()],
        "tags": _tags(result, index),
        "audio": "",
    }
    if scored is not None:
        row |= _scored(scored, text_normalizer(result.normalizer)(response.encoder_text or ""))
    texts = (
        response.text,
        response.pred_text,
        response.id,
        response.voice,
        response.condition,
        response.audio_of,
    )
    row["search"] = " ".join(text for text in (*texts, *row["seen"]) if text).lower()
    return row


def _seen(response: Response) -> list[str]:
    """What of a row is in the training data."""
    marks = (("reference", response.is_seen_text), ("recording", response.is_seen_audio))
    return [f"{name} in the training data" for name, is_seen in marks if is_seen]


def _tags(result: Evaluation, index: int) -> list[str]:
    response = result.responses[index]
    tags = [f"{response.duration_s:.2f} s"]
    if response.voice:
        tags.append(response.voice)
    if response.condition:
        tags.append(response.condition)
    if response.rtf is not None:
        tags.append(f"RTF {response.rtf:.3f}")
    if response.audio_of is not None:
        tags.append(f"audio of {response.audio_of}")
    return tags


def _scored(scored: ScoredResponse, encoder_text: str) -> dict[str, Any]:
    """Fields of a row with a reference."""
    merge = scored.merges_compounds
    errors = word_errors([scored.text], [scored.pred_text], merge_compounds=merge)
    response = scored.response
    row: dict[str, Any] = {
        "errors": errors.errors,
        "badness": _badness(errors),
        "wer": "n/a" if errors.wer is None else f"{errors.wer:.0%}",
        "grade": "right" if not errors.errors else "bad" if _badness(errors) >= 0.5 else "some",
        "counts": _counts(errors),
        "words": align_words(scored.text, scored.pred_text),
    }
    reference, hypothesis = response.text or "", response.pred_text
    if (reference.split(), hypothesis.split()) != (scored.text.split(), scored.pred_text.split()):
        row["raw"] = (reference, hypothesis)
    if response.encoder_text is not None:
        row["encoder_text"] = encoder_text
        encoder = word_errors([scored.text], [encoder_text], merge_compounds=merge)
        row["encoder_wer"] = percent(encoder.wer)
    return row


def _badness(errors: WordErrors) -> float:
    """The WER; infinite for hypothesis words without reference words."""
    if errors.wer is None:
        return math.inf if errors.errors else 0.0
    return errors.wer


def _counts(errors: WordErrors) -> str:
    named = (
        (errors.substitutions, "S"),
        (errors.deletions, "D"),
        (errors.insertions, "I"),
    )
    return " ".join(f"{count} {name}" for count, name in named if count) or "right"


def embed(
    readers: Sequence[Callable[[int], Float[np.ndarray, " S"]]], rate_hz: int
) -> list[Media | None]:
    """Reads and encodes recordings; None for one that cannot be read, or has no samples."""

    def encode(read: Callable[[int], Float[np.ndarray, " S"]]) -> Media | None:
        try:
            wave = read(rate_hz)
        except AudioError:
            return None
        if not len(wave):  # a conversation of texts
            return None
        return Media(
            audio=audio_uri(wave, rate_hz),
            spectrogram=_uri("image/png", spectrogram_png(wave, rate_hz)),
            duration_s=len(wave) / rate_hz,
        )

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(encode, readers))


def shown_media(media: Media, longest_s: float) -> dict[str, Any]:
    """Embedded media; all spectrograms have the same time scale."""
    width_px = max(PICTURE_PX * media.duration_s / longest_s, 64)
    step_s = next(
        (s for s in TICK_STEPS_S if s * width_px / media.duration_s >= 52), TICK_STEPS_S[-1]
    )
    return {
        "audio": media.audio,
        "spectrogram": media.spectrogram,
        "width_px": width_px,
        "ticks": ticks(media.duration_s, step_s),
    }


def ticks(duration_s: float, step_s: float) -> list[dict[str, Any]]:
    """The ticks of a time axis."""
    times = np.arange(0, duration_s, step_s)
    return [{"percent": 100 * t / duration_s, "name": f"{t:g} s"} for t in times]


# Head ------------------------------------------------------------------------------------------


def _head(totals: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    model = record["model"]["name"]
    counted = f"{totals['utterances']} utterances, {totals['audio_s'] / 60:.1f} min"
    return {
        "title": f"{model}: WER {percent(totals['wer'])}",
        "model": model,
        "facts": facts(record, counted),
        "totals": totals,
        "verdict": totals["verdict"],
        "figures": figures(totals),
        "groups": _groups(totals),
        "record": record_lines(record),
    }


def facts(record: Mapping[str, Any], counted: str) -> list[str]:
    """The line below the model's name: step, data, its size, date and device."""
    device, inputs = record["device"], record["settings"].get("inputs")
    listed = inputs if inputs is None or isinstance(inputs, str) else ", ".join(inputs)
    found = [
        counted if listed is None else f"on {listed}",
        *([] if inputs is None else [counted]),
        str(record["date"]).replace("T", " ").replace("+00:00", " UTC"),
        f"{device['kind']}, {record['dtype']}",
    ]
    if "step" in record["model"]:
        found.insert(0, f"step {record['model']['step']}")
    return found


def _groups(totals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """WER by voice (worst first) and by length, as bars with one scale."""
    voices = sorted(totals["by_voice"].items(), key=lambda v: -(v[1]["wer"] or 0.0))
    found = (("voice", voices), ("length", list(totals["by_length"].items())))
    rates = [errors["wer"] or 0.0 for _, groups in found for _, errors in groups]
    scale = 100 / max([*rates, 0.01])
    return [
        {
            "title": f"WER by {kind}",
            "kind": kind,
            "bars": [
                {
                    "name": name,
                    "rate": percent(errors["wer"]),
                    "width": scale * (errors["wer"] or 0.0),
                    "utterances": errors["utterances"],
                    "is_unseen": kind == "voice" and name in totals["unseen_voices"],
                }
                for name, errors in groups
            ],
        }
        for kind, groups in found
        if groups
    ]


def _menus(result: Evaluation) -> list[dict[str, Any]]:
    """Filter menus: voice and length."""
    voices = sorted({a.voice for a in result.responses if a.voice})
    in_order = sorted(result.responses, key=lambda a: a.duration_s)
    lengths = list(dict.fromkeys(a.length for a in in_order))
    unseen = [(UNSEEN, "Unseen voices")] if any(a.is_unseen for a in result.responses) else []
    by_voice = {"kind": "voice", "label": "Voice", "all": "All voices"}
    by_length = {"kind": "length", "label": "Length", "all": "All lengths"}
    menus = [
        {**by_voice, "options": [*unseen, *((v, v) for v in voices)]},
        {**by_length, "options": [(name, name) for name in lengths]},
    ]
    return [menu for menu in menus if menu["options"]]


def record_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The provenance as (name, value) rows."""
    settings = record["settings"]
    lines = [("model", record["model"]["name"]), ("sha256", record["model"]["sha256"])]
    lines += [(key, value) for key, value in settings.items() if key != "pretrained_name"]
    lines += [("versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items()))]
    return [(name, str(value)) for name, value in lines if value not in (None, "")]
