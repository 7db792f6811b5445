"""The page of a duplex model: what it shows, and that it works in a real browser."""

import re

import numpy as np
import pytest

from speechlm2_jax.evaluation.duplex.results import duplex_table
from speechlm2_jax.evaluation.html_report.waveform import waveform_path
from tests.evaluation.browser import Browser, find_browser
from tests.evaluation.duplex_page_case import small_results, write_small_duplex_page
from tests.evaluation.page_case import HOSTILE

BROWSER = find_browser()
WORST_FIRST = ["hostile", "continues", "silent", "interrupted", "right", "unscored", "broken"]
IDS = (
    "[...document.querySelectorAll('.row')].filter(r => !r.hidden)"
    ".map(r => r.querySelector('.id').title)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_small_duplex_page(tmp_path_factory.mktemp("page"))


def test_the_page_is_one_file_worst_first_and_no_text_is_markup(page):
    html = page.read_text()
    assert re.findall(r'class="id" title="(\w+)"', html) == WORST_FIRST
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert HOSTILE not in html and "&lt;script&gt;window.hacked=1" in html
    assert html.count("<audio") == 3 * (len(WORST_FIRST) - 1)
    assert "no response: broken.wav: truncated" in html
    assert "barge-in: stops after 0.90 s" in html and "barge-in: continues for 2.80 s" in html
    assert "no response" in html and "-0.40 s" in html


def test_only_the_worst_are_embedded(tmp_path):
    html = write_small_duplex_page(tmp_path, media_rows=2).read_text()
    assert html.count("<audio") == 6
    assert "Waveforms and audio are in the 2 worst rows" in html


def test_the_outline_of_a_recording_is_as_loud_as_it_is():
    wave = np.concatenate([np.zeros(100), np.ones(100), -np.ones(100)]).astype(np.float32)
    numbers = [float(y) for y in re.findall(r",(\d+)", waveform_path(wave, 3, loudest=1.0))]
    top, bottom = numbers[:3], numbers[:2:-1]
    assert [round(b - t) for t, b in zip(top, bottom, strict=True)][1:] == [48, 48]
    assert top[1] < 5 and bottom[2] > 95 and bottom[0] - top[0] <= 2


def test_the_table_has_a_column_per_set():
    totals = {
        "conversations": 3,
        "failed": {"missing": 1},
        "audio_s": 12.0,
        "generate_s": 6.0,
        "scores": {"txt_bleu": 15.0, "wer": None},
        "by_set": {
            "a": {"conversations": 2, "scores": {"txt_bleu": 10.0, "wer": 0.5}},
            "b": {"conversations": 1, "scores": {"txt_bleu": 20.0}},
        },
        "rtfx": 2.0,
        "rtfx_without_warm_up": None,
    }
    head, bleu, wer, count, failed, speed = duplex_table(totals).splitlines()
    assert head.split() == ["a", "b", "mean"]
    assert bleu.split()[-3:] == ["10.00", "20.00", "15.00"]
    assert wer.split()[-3:] == ["50.00%", "n/a", "n/a"]
    assert count.split() == ["conversations", "2", "1", "3"]
    assert failed == "failed: 1 missing" and "RTFx 2.0, without warm-up n/a" in speed


@pytest.mark.skipif(BROWSER is None, reason="no browser here: apt install chromium")
def test_one_head_follows_whichever_voice_plays(page, tmp_path):
    with Browser(str(BROWSER), tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.run(IDS) == WORST_FIRST
        browser.run("window.row = document.querySelector('.row')")
        browser.run("window.players = [...row.querySelectorAll('audio')]")
        browser.until("players.every(p => p.readyState > 0)")
        seconds = {a.id: a.duration_s for a in small_results()}["hostile"]
        assert browser.run("players.map(p => p.duration)") == pytest.approx([seconds] * 3, abs=0.1)
        # a click on a word plays from there; then another voice goes on from the same place
        browser.run("row.querySelector('.lane.agent [data-at]').click()")
        browser.until("!players[0].paused && players[0].currentTime > 2.6")
        browser.press("a")
        browser.until("players[0].paused && !players[2].paused && players[2].currentTime > 2.6")
        assert browser.run("row.classList.contains('playing')")
        head = browser.run("parseFloat(row.querySelector('.head').style.left)")
        assert 50 < head <= 100
        browser.run("players[2].pause()")
        browser.until("row.classList.contains('paused')")
        browser.run("document.getElementById('set').value = 'kitchen'")
        browser.run("document.getElementById('set').dispatchEvent(new Event('change'))")
        assert browser.run(IDS) == ["continues", "interrupted"]
        assert "2 of 7 conversations" in browser.run("document.getElementById('count').value")
        assert browser.run("window.hacked") is None
        wide = "document.documentElement.scrollWidth <= innerWidth"
        assert browser.run(wide), "the page itself never scrolls sideways"
