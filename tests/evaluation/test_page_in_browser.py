"""The page in a real browser: it plays, filters, sorts, and lets nobody else's script run."""

import pytest

from tests.evaluation.browser import Browser, find_browser
from tests.evaluation.page_case import ROWS, WORST, write_small_page

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no browser here: install chromium (apt install chromium) or set CHROME_PATH",
)
SHOWN = (
    "[...document.querySelectorAll('.row')].filter(r => !r.hidden)"
    ".map(r => r.querySelector('.id').title)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with Browser(str(BROWSER), folder / "profile") as browser:
        yield browser


@pytest.fixture
def page(browser, tmp_path):
    """A freshly opened page; its scripts have run."""
    write_small_page(tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    return browser


def _choose(page, menu, value):
    page.run(
        f"document.getElementById('{menu}').value = '{value}';"
        f"document.getElementById('{menu}').dispatchEvent(new Event('change'))"
    )


def test_the_worst_utterance_is_on_top(page):
    assert page.run(SHOWN)[0] == WORST
    tops = page.run(
        "[...document.querySelectorAll('.row')].map(r => r.getBoundingClientRect().top)"
    )
    assert tops == sorted(tops), "the order of the file is the order on the screen"
    scores = page.run(
        "[...document.querySelectorAll('.score b')].map(b => parseFloat(b.textContent)).slice(0, 5)"
    )
    assert scores == sorted(scores, reverse=True)


def test_a_recording_loads_and_plays(page):
    seconds = {row[0]: row[2] for row in ROWS}[WORST]
    page.run("window.player = document.querySelector('.row audio')")
    page.until("player.readyState > 0")  # near rows load by themselves
    assert page.run("player.duration") == pytest.approx(seconds, abs=0.1)
    page.run("player.play()")
    page.until("player.currentTime > 0.1")
    assert page.run("player.error") is None
    assert page.run("document.querySelector('.row').classList.contains('playing')")
    assert page.run("parseFloat(document.querySelector('.head').style.left)") > 0


def test_the_spectrogram_is_a_picture_and_plays_from_where_it_is_clicked(page):
    image = "document.querySelector('.picture img')"
    page.until(f"{image}.complete && {image}.naturalWidth > 0")
    assert page.run(f"[{image}.naturalWidth, {image}.naturalHeight]") == [120, 80]
    page.run(
        "{const box = document.querySelector('.picture').getBoundingClientRect();"
        "document.querySelector('.picture').dispatchEvent(new MouseEvent('click', {bubbles: true,"
        "clientX: box.left + box.width / 2, clientY: box.top + 5}))}"
    )
    page.until("document.querySelector('audio').currentTime >= 0.7")


def test_filters_by_voice_length_and_words_combine(page):
    _choose(page, "voice", "ben")
    assert page.run(SHOWN) == [WORST, "hostile"]
    assert page.run("document.getElementById('count').value") == "2 of 7 utterances"
    _choose(page, "length", "3 to 4 s")
    assert page.run(SHOWN) == ["hostile"]
    page.run("document.getElementById('search').value = 'morning'")
    page.run("document.getElementById('search').dispatchEvent(new Event('input'))")
    assert page.run(SHOWN) == []
    assert page.run("!document.getElementById('empty').hidden")
    page.run("document.getElementById('reset').click()")
    assert len(page.run(SHOWN)) == 7


def test_box_and_list_agree_after_escape(page):
    page.press("/")
    for letter in "morning":
        page.press(letter)
    assert 0 < len(page.run(SHOWN)) < 7
    for kind in ("rawKeyDown", "keyUp"):
        keys = {"key": "Escape", "code": "Escape", "windowsVirtualKeyCode": 27}
        page.call("Input.dispatchKeyEvent", type=kind, **keys)
    page.until("document.getElementById('search').value === ''")
    page.until("document.getElementById('count').value === '7 utterances'")
    assert len(page.run(SHOWN)) == 7
    assert page.run("document.activeElement.id") != "search"


def test_unseen_voices_and_bars_filter_too(page):
    _choose(page, "voice", "*unseen*")
    assert page.run(SHOWN) == ["short"]
    page.run("document.querySelector('.bar[data-value=anna]').click()")
    assert page.run(SHOWN) == ["close", "right"]
    assert page.run("document.querySelector('.bar[aria-pressed=true] .name').innerText") == "anna"
    page.run("document.querySelector('.bar[data-value=anna]').click()")
    assert len(page.run(SHOWN)) == 7


def test_order_can_be_changed(page):
    _choose(page, "sort", "longest")
    assert page.run(SHOWN)[0] == "hostile"
    _choose(page, "sort", "input")
    assert page.run(SHOWN)[:2] == ["right", "close"]
    _choose(page, "sort", "worst")
    assert page.run(SHOWN)[0] == WORST


def test_keys_move_and_play(page):
    for key in ("j", "j", "k", "ArrowDown"):
        page.press(key)
    assert page.run("document.querySelector('.current .id').title") == "hostile"
    page.press(" ")
    page.until("document.querySelector('.current audio').currentTime > 0")
    page.press(" ")
    page.until("document.querySelector('.current audio').paused")
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.press("j")  # a letter of the search, not a move
    assert page.run("document.querySelector('.current .id').title") == "hostile"


def test_no_script_of_a_hypothesis_runs_and_nothing_is_fetched(page):
    assert page.run("typeof window.hacked") == "undefined"
    fetched = "performance.getEntriesByType('resource').map(r => r.name.slice(0, 5))"
    assert set(page.run(fetched)) <= {"data:"}
    page.run("{const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
             "document.body.append(s)}")  # fmt: skip
    assert page.run("typeof window.hacked") == "undefined"
