"""The page as a file: order, escaping, what is embedded, and that nothing is outside of it."""

import base64
import hashlib
import html
import io
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from speechlm2_jax.evaluation.html_report.page import audio_uri, write_page
from speechlm2_jax.evaluation.results import Evaluation, Response, Speed
from tests.evaluation.page_case import (
    HOSTILE,
    RATE_HZ,
    RECORD,
    small_case,
    tone,
    utterance,
    write_small_page,
)


def _rows(page):
    """(id, text) of each row, in the page's order."""
    rows = re.split(r'<li class="row"', page)[1:]
    return [(html.unescape(re.search(r'class="id" title="([^"]*)"', r)[1]), r) for r in rows]


def test_the_worst_utterance_is_first_and_unscored_ones_are_last(tmp_path):
    page = write_small_page(tmp_path / "report.html")
    assert [name for name, _ in _rows(page)] == [
        "worst", "hostile", "short", "close", "right", "broken", "unscored",
    ]  # fmt: skip


def test_a_response_to_an_empty_reference_is_as_bad_as_can_be(tmp_path):
    def change(result):
        empty = replace(result.responses[0], text="", pred_text="the cat sat")
        return replace(result, responses=(empty, *result.responses[1:]))

    page = write_small_page(tmp_path / "report.html", change=change)
    assert [name for name, _ in _rows(page)][:2] == ["right", "worst"]


def test_words_are_aligned_and_marked_by_kind(tmp_path):
    rows = dict(_rows(write_small_page(tmp_path / "report.html")))
    close = re.sub(r"\s+", " ", rows["close"])
    assert '<span class="op"><b>cat</b><b>cat</b></span>' in close
    substituted = '<span class="op substitute"><del>the</del><ins>a</ins><u>S</u></span>'
    assert substituted in close
    assert close.count("<u>") == 1
    assert '<span class="op delete"><del>please</del>' in rows["short"]
    assert rows["worst"].count('class="op insert"') == 2
    assert ">2 S 2 I<" in rows["worst"]


def test_generated_text_is_never_markup(tmp_path):
    page = write_small_page(tmp_path / "report.html")
    assert HOSTILE not in page
    assert page.count("<script>") == 1
    assert "<img src=x" not in page
    assert html.escape("<script>window.hacked=1</script>") in page


def test_nothing_is_outside_of_the_file(tmp_path):
    page = write_small_page(tmp_path / "report.html")
    own = re.sub(r"data:[^\"]+", "data:", page)
    assert not re.search(r"https?://|//cdn|@import|url\(|<link|<iframe", own)
    assert set(re.findall(r'\bsrc="([^"]{0,5})', own)) == {"data:"}
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_only_the_pages_own_script_may_run(tmp_path):
    page = write_small_page(tmp_path / "report.html")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in page
    assert f"script-src 'sha256-{digest}'" in page


def test_only_the_worst_rows_carry_audio_and_the_page_notes_it(tmp_path):
    page = write_small_page(tmp_path / "report.html", media_rows=2)
    rows = _rows(page)
    assert ["<audio" in row for _, row in rows] == [True, True] + [False] * 5
    assert "in the 2 worst rows; report_rows=N embeds more" in page
    assert "report_rows=N" not in write_small_page(tmp_path / "all.html")


def test_an_unreadable_recording_shows_its_error_and_has_no_player(tmp_path):
    rows = dict(_rows(write_small_page(tmp_path / "report.html")))
    assert "no response: broken.ogg: truncated" in rows["broken"]
    assert "<audio" not in rows["broken"]
    assert "who knows" in rows["unscored"]


def test_embedded_audio_is_the_input():
    wave = tone(2.3)
    kind, _, data = audio_uri(wave, RATE_HZ).partition(";base64,")
    assert kind == "data:audio/ogg"
    decoded, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
    assert (rate_hz, len(decoded)) == (RATE_HZ, len(wave))
    assert np.corrcoef(decoded, wave)[0, 1] > 0.99
    assert len(data) < len(wave) / 2, "a quarter of 16-bit samples, in base64"


def test_the_head_tells_errors_by_voice_and_length_and_beside_the_encoder(tmp_path):
    result, _ = small_case()
    texts = [None if a.text is None else "the cat sat" for a in result.responses]
    page = write_small_page(tmp_path / "report.html", change=lambda r: r.with_encoder_texts(texts))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<body>")[2]))
    totals = result.totals()
    assert f"Word error rate {100 * totals['wer']:.2f} %" in text
    assert "Unseen voices 50.00 % cleo" in text
    assert "Encoder alone" in text
    assert "ben" in text
    assert "0 to 1 s" in text
    assert "step 40" in text
    assert "corpus/test.jsonl" in text
    assert "2026-01-02 03:04:05 UTC" in text
    assert "encoder alone the cat sat 0.00%" in text


def test_swapped_audio_is_named(tmp_path):
    def change(result):
        return replace(
            result, responses=tuple(replace(a, audio_of=f"other {a.id}") for a in result.responses)
        )

    page = write_small_page(tmp_path / "report.html", change=change)
    assert "The audio is swapped." in page
    assert "audio of other worst" in page
    assert "The audio is swapped." not in write_small_page(tmp_path / "straight.html")


def test_a_page_without_any_reference_is_still_a_page(tmp_path):
    responses = (Response(id="a.wav", duration_s=1.0, text=None, pred_text="hello"),)
    write_page(
        tmp_path / "report.html",
        Evaluation(responses=responses, speed=Speed()),
        [utterance("a.wav", 1.0)],
        RECORD,
        media_rows=5,
        rate_hz=RATE_HZ,
    )
    ((name, row),) = _rows((tmp_path / "report.html").read_text())
    assert name == "a.wav"
    assert "hello" in row
    assert "<audio" in row


@pytest.mark.slow
def test_a_page_of_two_thousand_rows_takes_seconds(tmp_path):
    texts = [f"some words of sentence {n} here" for n in range(2000)]
    responses = tuple(
        Response(id=f"u{n}", duration_s=4.0, text=t, pred_text=t[n % 9 :], voice=f"v{n % 12}")
        for n, t in enumerate(texts)
    )
    begin = time.process_time()
    write_page(
        tmp_path / "report.html",
        Evaluation(responses=responses, speed=Speed(), normalizer="none"),
        [utterance(a.id, 4.0) for a in responses],
        RECORD,
        media_rows=300,
        rate_hz=RATE_HZ,
    )
    # processor time of all threads: what two idle cores do in half of it
    assert time.process_time() - begin < 20
    assert (tmp_path / "report.html").stat().st_size < 40e6
