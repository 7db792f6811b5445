r"""Scores a SALM on a data set by the protocol of the Open ASR Leaderboard, and times it.

    python -m benchmarks.open_asr_leaderboard nvidia/canary-qwen-2.5b FOLDER_OF_PARQUET
    python -m benchmarks.open_asr_leaderboard runs/salm corpus/test.jsonl --batch 8 --dtype float32

A data set is a folder of Parquet files (columns `audio`, and `text` or another name that the board
reads) or a NeMo manifest. The protocol is that of huggingface/open_asr_leaderboard: bf16, batches
of 192 recordings, longest first, the prompt in `slots`, greedy, 128 new tokens. Four batches are
transcribed before the clock starts; reading audio counts. RTFx is the sum of the durations over
that time. References without words are left out. WER is over the corpus, of texts as the board's
English normaliser writes them, with compounds merged. `--output` gets the raw texts, a row each.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from speechlm2_jax.data.audio import audio_length, read_audio
from speechlm2_jax.data.json_lines import json_lines
from speechlm2_jax.evaluation.metrics.wer import text_normalizer, word_errors

PROMPT = "Transcribe the following: "
NEW_TOKENS, BATCH, WARM_UP_BATCHES = 128, 192, 4
TEXTS = ("text", "sentence", "normalized_text", "transcript", "transcription")
IGNORED = "ignore time segment in scoring"
"""A reference of TED-LIUM that the board leaves out, as it does empty ones."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One recording of the data set."""

    id: str
    text: str
    duration_s: float
    open: Callable[[], Any]
    """Its file: a path, or an open one."""


def recordings(place: Path) -> list[Recording]:
    """The recordings that the board scores, longest first."""
    rows = _parquet_rows(place) if place.is_dir() else _manifest_rows(place)
    found = [
        Recording(id=id, text=text, duration_s=audio_length(opened()).duration_s, open=opened)
        for id, text, opened in rows
        if text.strip() not in ("", IGNORED)
    ]
    return sorted(found, key=lambda one: -one.duration_s)


def _manifest_rows(place: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    for _, row in json_lines(place):
        path = place.parent / row["audio_filepath"]
        yield str(row["audio_filepath"]), row.get("text", ""), lambda path=path: path


def _parquet_rows(place: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    import pyarrow.parquet

    for path in sorted(place.rglob("*.parquet")):
        names = pyarrow.parquet.read_schema(path).names
        text = next((name for name in TEXTS if name in names), None)
        if text is None or "audio" not in names:
            sys.exit(f"{path}: no column audio, or none of {', '.join(TEXTS)}")
        table = pyarrow.parquet.read_table(path, columns=["audio", text, *{"id"} & {*names}])
        for number, row in enumerate(table.to_pylist()):
            name = str(row.get("id") or f"{path.stem}_{number}")
            yield name, row[text] or "", partial(io.BytesIO, row["audio"]["bytes"])


def transcribe(model: Any, chosen: Sequence[Recording], batch: int) -> list[str]:
    """The texts of recordings; the next batch is read while the device computes."""
    starts = range(0, len(chosen), batch)
    tag, texts = model.audio_locator_tag, []
    with ThreadPoolExecutor(1) as reader:
        read = partial(_read, rate_hz=model.sampling_rate)
        coming = reader.map(lambda start: read(chosen[start : start + batch]), starts)
        for waves, lengths in coming:
            ids = model.generate(
                [[{"role": "user", "slots": {"message": PROMPT + tag}}]] * len(lengths),
                *(waves, lengths),
                max_new_tokens=NEW_TOKENS,
            )
            texts += [_text(model, row) for row in np.asarray(ids)]
    return texts


def _read(chosen: Sequence[Recording], *, rate_hz: int) -> tuple[np.ndarray, np.ndarray]:
    waves = [read_audio(one.open(), sample_rate_hz=rate_hz) for one in chosen]
    lengths = np.asarray([len(wave) for wave in waves], np.int32)
    return np.stack([np.pad(w, (0, int(lengths.max()) - len(w))) for w in waves]), lengths


def _text(model: Any, ids: np.ndarray) -> str:
    ends = np.flatnonzero(np.isin(ids, [model.text_eos_id, model.text_pad_id]))
    return model.tokenizer.ids_to_text(ids[: ends[0]] if len(ends) else ids).strip()


def score(model: Any, chosen: Sequence[Recording], batch: int) -> tuple[dict[str, Any], list[str]]:
    """The figures of the board, and the raw texts."""
    transcribe(model, chosen[: batch * WARM_UP_BATCHES], batch)
    begin = time.perf_counter()
    texts = transcribe(model, chosen, batch)
    seconds = time.perf_counter() - begin
    normalize = text_normalizer("leaderboard")
    pairs = [normalize(one.text) for one in chosen], [normalize(text) for text in texts]
    audio_s = sum(one.duration_s for one in chosen)
    figures = {
        "recordings": len(chosen),
        "audio_s": round(audio_s, 2),
        "transcribe_s": round(seconds, 3),
        "rtfx": round(audio_s / seconds, 2),
        "wer_percent": round(100 * (word_errors(*pairs, merge_compounds=True).wer or 0.0), 2),
        "wer_percent_jiwer": round(100 * (word_errors(*pairs).wer or 0.0), 2),
    }
    return figures, texts


def main() -> None:
    """Prints the figures and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.open_asr_leaderboard")
    parser.add_argument("model", help="run, saved model, or hub name of a SALM")
    parser.add_argument("data", type=Path, help="folder of Parquet files, or a manifest")
    parser.add_argument("--batch", type=int, default=BATCH, help="recordings at once")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations")
    parser.add_argument("--output", type=Path, help="JSON lines: text, pred_text, duration")
    arguments = parser.parse_args()
    from speechlm2_jax.models import SALM

    chosen = recordings(arguments.data)
    if not chosen:
        sys.exit(f"{arguments.data}: no recording with a reference")
    timing.log(f"{len(chosen)} recordings; loading {arguments.model} ...")
    model = SALM.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    figures, texts = score(model, chosen, arguments.batch)
    if arguments.output is not None:
        rows = [
            {"audio_filepath": r.id, "duration": r.duration_s, "text": r.text, "pred_text": t}
            for r, t in zip(chosen, texts, strict=True)
        ]
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    timing.report([figures], {**figures, "batch": arguments.batch, "machine": timing.machine()})


if __name__ == "__main__":
    main()
