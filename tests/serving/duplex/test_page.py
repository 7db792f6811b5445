"""The page in a real browser, whose microphone plays a file."""

import base64
import io
import json

import numpy as np
import pytest
import soundfile

from tests.evaluation.browser import Browser, find_browser
from tests.serving.duplex.fake_sessions import FakeSessions, quiet, running, tone

BROWSER = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None,
        reason="no browser here: install chromium (apt install chromium) or set CHROME_PATH",
    ),
]
FACTS = "document.getElementById('facts').textContent"
AGENT = "document.querySelectorAll('#turns .agent')"
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
SAVED = """
(async () => {
  const blobs = {};
  save = (blob, name) => { blobs[name] = blob; };
  download();
  const found = {};
  for (const name in blobs) found[name] = base64(new Uint8Array(await blobs[name].arrayBuffer()));
  return found;
})()
"""


@pytest.fixture(scope="module")
def microphone(tmp_path_factory):
    """Two seconds of silence, a tone, silence; it begins again at its end."""
    path = tmp_path_factory.mktemp("microphone") / "user.wav"
    wave = np.concatenate([quiet(1.5, 48000), tone(1.0, 48000), quiet(2.0, 48000)])
    soundfile.write(path, wave, 48000, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def browser(microphone, tmp_path_factory):
    flags = (
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
    )
    with Browser(str(BROWSER), tmp_path_factory.mktemp("browser") / "profile", flags) as browser:
        yield browser


def opened(browser, server):
    browser.call("Page.navigate", url="about:blank")
    browser.until("location.protocol === 'about:'")
    browser.call("Page.navigate", url=server.http)
    browser.until("document.readyState === 'complete' && location.protocol === 'http:'")
    browser.until("!document.getElementById('connect').disabled")
    # the file has its own levels; processing would change them
    browser.run("at('echo').checked = at('noise').checked = false")
    return browser


def press(page, key):
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key)


def test_a_conversation_is_shown_and_can_be_saved(browser):
    with running(FakeSessions(), stall_s=0.4) as server:
        page = opened(browser, server)
        page.run("at('connect').click()")
        page.until("at('status').textContent === 'connected'")
        page.until(f"{AGENT}.length >= 1 && {AGENT}[0].dataset.head.includes('–')")
        assert page.run(f"{AGENT}[0].textContent").split(), "the words of the agent"
        page.until(f"{FACTS}.startsWith('reply')")
        assert page.run("record.turns.some((own) => own.role === 'user')")
        press(page, "m")
        assert page.run("at('mute').getAttribute('aria-pressed')") == "true"
        sent = page.run("record.sent")
        page.until(f"record.sent > {sent} + HZ / 2")
        assert page.run("Math.max(...record.user.slice(-10).flatMap((own) => [...own]))") == 0
        page.run("at('connect').click()")
        page.until("at('status').textContent === 'not connected' && !at('download').disabled")
        assert page.run("at('error').hidden")
        saved = page.run(SAVED)
        server.until(lambda: server.service.active == 0)
        hosts = "performance.getEntriesByType('resource').map((r) => new URL(r.name).host)"
        fetched = page.run(hosts)
        assert set(fetched) <= {page.run("location.host"), ""}, "nothing comes from elsewhere"
    (wav,) = (base64.b64decode(data) for name, data in saved.items() if name.endswith(".wav"))
    (facts,) = (json.loads(base64.b64decode(d)) for n, d in saved.items() if n.endswith(".json"))
    wave, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    assert rate == 24000 and wave.shape[1] == 2 and len(wave) >= 24000 * facts["duration_s"] - 1
    user, agent = np.abs(wave).max(0)
    assert agent == pytest.approx(user / 2, rel=0.2) and user > 0.1
    assert {turn["role"] for turn in facts["turns"]} == {"user", "agent"}
    assert facts["reply_ms"]["p50"] > 0


def test_an_interruption_ends_the_agents_turn(browser):
    with running(FakeSessions(), stall_s=0.4) as server:
        page = opened(browser, server)
        page.run("at('connect').click()")
        page.until("!at('interrupt').disabled")
        press(page, "i")
        page.until(f"{AGENT}[0].dataset.head.includes('interrupted')")
        assert server.service.device._sessions.interrupted == 1
        page.run("at('connect').click()")
        page.until("at('status').textContent === 'not connected'")


def test_what_is_wrong_is_told(browser):
    with running(FakeSessions(), max_sessions=1, api_keys=("secret",)) as server:
        page = opened(browser, server)
        page.run("at('key').value = ''")
        page.run("at('connect').click()")
        page.until("!at('error').hidden")
        assert (
            page.run("at('error').textContent")
            == "The server needs a key: give it in the settings."
        )
        refused = "async () => { throw new DOMException('', 'NotAllowedError'); }"
        page.run(f"void (navigator.mediaDevices.getUserMedia = {refused})")
        page.run("at('connect').click()")
        page.until("at('error').textContent.startsWith('The microphone was refused.')")
        page.until("!at('connect').disabled")
        page.run("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
        page.run("at('connect').click()")
        page.until("at('error').textContent.includes('only to localhost and to https')")
        page.call("Emulation.setDeviceMetricsOverride", **PHONE)
        try:
            assert page.run("document.documentElement.scrollWidth") <= 360
        finally:
            page.call("Emulation.clearDeviceMetricsOverride")
