"""A small evaluation with everything that a page can show."""

from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.html_report.page import write_page
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed

RATE_HZ = 16_000
HOSTILE = '<script>window.hacked=1</script> <img src=x onerror="window.hacked=1"> & "so"'
WORST = "worst"
# id, voice, seconds, reference, hypothesis
ROWS = (
    ("right", "anna", 1.2, "the cat sat", "the cat sat"),
    ("close", "anna", 2.5, "the cat sat on the mat", "the cat sat on a mat"),
    (WORST, "ben", 1.5, "good morning", "no not at all"),
    ("hostile", "ben", 3.5, "one two three four five six seven", f"one two {HOSTILE}"),
    ("short", "cleo", 0.6, "yes please", "yes"),
)
RECORD: dict[str, Any] = {
    "model": {"name": "runs/tiny", "sha256": "ab12", "step": 40},
    "device": {"platform": "cpu", "kind": "cpu"},
    "dtype": "float32",
    "settings": {"inputs": "corpus/test.jsonl", "user_prompt": "Transcribe:", "report_rows": 300},
    "versions": {"jax": "0.10.2"},
    "date": "2026-01-02T03:04:05+00:00",
}


def tone(seconds: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    """A rising tone, so that spectrograms differ from left to right."""
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.3 * np.sin(2 * np.pi * (300 + 600 * time_s) * time_s)).astype(np.float32)


def utterance(name: str, seconds: float, text: str | None = None, **fields: Any) -> Utterance:
    def read(rate_hz: int) -> np.ndarray:
        if name == "broken":
            raise AudioError("broken.ogg: truncated", cause="truncated")
        return tone(seconds, rate_hz)

    return Utterance(id=name, duration_s=seconds, text=text, read=read, **fields)


def small_case() -> tuple[Evaluation, list[Utterance]]:
    """ROWS, one recording that cannot be read and one without a reference."""
    responses = [
        Response(id=i, voice=v, duration_s=s, text=t, pred_text=p, is_unseen=v == "cleo", rtf=0.05)
        for i, v, s, t, p in ROWS
    ]
    responses.append(
        Response(id="broken", duration_s=2.0, text="x", pred_text="", error="broken.ogg: truncated")
    )
    responses.append(Response(id="unscored", duration_s=1.0, text=None, pred_text="who knows"))
    result = Evaluation(
        responses=tuple(responses), speed=Speed(audio_s=12.3, generate_s=2.0), normalizer="none"
    )
    return result, [utterance(a.id, a.duration_s, a.text) for a in responses]


def write_small_page(path: Path, media_rows: int = 300, **changes: Any) -> str:
    """Writes and returns the page of `small_case`, some of its responses changed."""
    result, utterances = small_case()
    result = changes.pop("change", lambda r: r)(result)
    write_page(path, result, utterances, RECORD, media_rows=media_rows, rate_hz=RATE_HZ)
    return path.read_text(encoding="utf-8")
