"""The page of the server in a real browser, with a microphone that the browser pretends."""

import base64
import json

import httpx
import numpy as np
import pytest

from tests.evaluation.browser import Browser, find_browser
from tests.serving.server_case import (
    OPTIONS,
    EvenAligner,
    load_tiny,
    recording,
    running,
    wav_bytes,
)

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no browser here: install chromium (apt install chromium) or set CHROME_PATH",
)
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
DROP = """
{
  const bytes = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], "a.wav", { type: "audio/wav" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true }));
}
"""
TEXT = "document.getElementById('text').textContent.trim()"
FACTS = "document.getElementById('facts').textContent"
RESPONSE = "document.querySelector('#turns .assistant')"


@pytest.fixture(scope="module")
def model():
    return load_tiny()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = tmp_path_factory.mktemp("browser") / "profile"
    with Browser(str(BROWSER), profile, MICROPHONE) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(model):
    with running(model, aligner=EvenAligner()) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The page, freshly opened; the server is ready."""
    browser.call("Page.navigate", url="about:blank")
    browser.until("location.protocol === 'about:'")
    browser.call("Page.navigate", url=server.url)
    browser.until("document.readyState === 'complete' && location.protocol === 'http:'")
    browser.until("document.getElementById('status').textContent === 'tiny'")
    return browser


def test_a_dropped_file_is_transcribed_and_can_be_asked_about(page, model):
    samples = recording(1)
    page.run(DROP % base64.b64encode(wav_bytes(samples)).decode())
    page.until(f"{FACTS}.includes('tokens')")
    expected = model.transcribe(
        [samples], prompt=OPTIONS.prompt, max_new_tokens=OPTIONS.max_new_tokens
    )
    assert page.run(TEXT) == expected[0]
    assert page.run("player.duration") == pytest.approx(7000 / 16000, abs=0.05)
    page.run("document.getElementById('question').value = 'What is it?'")
    page.run("document.getElementById('question').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13)
    page.until(f"{RESPONSE} && !document.getElementById('send').disabled")
    assert page.run(f"{RESPONSE}.textContent.length") > 0
    assert not page.run(f"{RESPONSE}.classList.contains('failed')")
    fetched = page.run("performance.getEntriesByType('resource').map(r => new URL(r.name).host)")
    assert set(fetched) <= {page.run("location.host"), ""}, "nothing comes from elsewhere"


def test_words_are_highlighted_while_they_are_played(page):
    samples = np.concatenate([recording(n) for n in range(3)])
    page.run(DROP % base64.b64encode(wav_bytes(samples)).decode())
    page.until(f"{FACTS}.includes('tokens')")
    words = page.run("state.words.map((word) => [word.word, word.start, word.end])")
    text, spans = page.run(TEXT), "document.querySelectorAll('#text .word')"
    assert text.split() == [word for word, _, _ in words] and len(words) > 2
    assert page.run(f"{spans}.length") == len(words)
    segments = page.run("state.segments.map(({ start, text }) => [start, text.trim()])")
    shown = "[...document.querySelectorAll('#text p')].map((p) => p.textContent.trim())"
    assert page.run(shown) == [text for _, text in segments] and len(segments) > 1
    assert page.run("at('text').lastChild.dataset.time") == "0:00"
    assert page.run("[clock(3725.9), clock(65)]") == ["1:02:05", "1:05"]
    now = "[...document.querySelectorAll('.now')].map((span) => span.textContent)"
    word, start, end = words[-1]
    page.run(f"at('player').currentTime = {(start + end) / 2}")
    page.until(f"{now}.length === 1")
    assert page.run(now) == [word]
    page.run(f"{spans}[0].click()")
    page.until(f"{now}[0] === {json.dumps(words[0][0])}")
    assert page.run("at('player').currentTime") == pytest.approx(words[0][1], abs=0.01)


def test_subtitles_can_be_saved(page, server):
    samples = np.concatenate([recording(n) for n in range(3)])
    page.run(DROP % base64.b64encode(wav_bytes(samples)).decode())
    page.until(f"{FACTS}.includes('tokens')")
    reply = httpx.post(
        f"{server.url}/v1/audio/transcriptions",
        files={"file": ("a.wav", wav_bytes(samples))},
        data={"model": "tiny", "response_format": "srt"},
        timeout=60,
    )
    assert page.run("subtitles()").strip() == reply.text.strip()
    assert not page.run("at('srt').hidden") and page.run("state.name") == "a.wav"


def test_a_recording_of_the_microphone_is_transcribed(page):
    page.run("document.getElementById('record').click()")
    page.until("document.getElementById('record').getAttribute('aria-pressed') === 'true'")
    page.run("new Promise((wake) => setTimeout(wake, 900))")
    page.run("document.getElementById('record').click()")
    page.until(f"{FACTS}.includes('tokens')")
    assert page.run("document.getElementById('name').textContent") == "your recording"
    assert page.run("document.getElementById('error').hidden")


def test_what_is_wrong_is_told_and_a_phone_has_room(page):
    page.run(DROP % base64.b64encode(b"no audio at all").decode())
    page.until("!document.getElementById('error').hidden")
    assert page.run("document.getElementById('error').textContent").startswith(
        "file: not an audio file, or damaged: "
    )
    metrics = dict(width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.call("Emulation.setDeviceMetricsOverride", **metrics)
    try:
        assert page.run("document.documentElement.scrollWidth") <= 360
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")
