"""The page of `zoomr view` in a real browser, where one is found: it draws, answers clicks and keys, and obeys no text."""

from __future__ import annotations

import browser
import pytest
from test_view import HOSTILE, hostile_trace
from traced import pictures, record, state_at

from zoomr_cli.view_page import page

pytestmark = pytest.mark.skipif(browser.find() is None, reason=browser.WHY_NOT)

ROWS = "[...document.querySelectorAll('.row')]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(path of the page, its pictures): one problem paged, one with everything in cells."""
    folder = tmp_path_factory.mktemp("page")
    record(folder / "t.jsonl")
    record(folder / "t.jsonl", "full")
    found = pictures(folder / "t.jsonl")
    (folder / "v.html").write_text(page(found, 0))
    return folder / "v.html", found


def test_it_draws_and_a_click_shows_a_thought(made, shown):
    path, (drawn, full) = made
    shown.load(path)
    assert shown.run(f"{ROWS}.length") == len(drawn["rows"]) == 22
    assert shown.run("document.querySelectorAll('.more').length") == 0
    shown.click(".row:nth-of-type(3)")
    assert shown.run("document.querySelectorAll('.more').length") == 1
    text = shown.run("document.querySelector('.more').innerText")
    thought = drawn["rows"][2]
    assert thought["text"].strip() in text and thought["summary_text"].strip() in text and f"came back {thought['zooms']} time" in text
    shown.click(".row:nth-of-type(3)")
    assert shown.run("document.querySelectorAll('.more').length") == 0
    shown.run("(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.getElementById('problem'))")
    assert "with everything in memory" in shown.run("document.body.innerText") and shown.run(f"{ROWS}.length") == len(full["rows"])
    assert shown.said == []


def test_an_address_can_name_a_thought(made, shown):
    path, (drawn, _) = made
    shown.load(path, "#4")
    (thought,) = [row for row in drawn["rows"] if row["number"] == 3]
    assert shown.run("document.querySelector('.more').innerText").startswith(f"Thought 4, tokens {thought['detail'][0]} to")
    shown.load(path, "#4000")
    assert shown.run("document.querySelectorAll('.more').length") == 0 and shown.said == []


def test_what_is_drawn_is_what_was_recorded(made, shown):
    """The zoomed stretches of each row and its strongest votes, read back from the drawing; and the words about a moment."""
    path, (drawn, _) = made
    shown.load(path)

    def stretches(name):
        paths = shown.run(f"{ROWS}.map(row => (row.querySelector('path.{name}') || {{getAttribute: () => ''}}).getAttribute('d'))")
        return [[[int(part.split(" ")[0]), int(part.split("H")[1].split("V")[0])] for part in d.split("M")[1:]] for d in paths]

    zoomed = stretches("zoomed")
    assert zoomed == [[[a, b] for a, b, state in row["states"] if state == "zoomed"] for row in drawn["rows"]] and sum(map(bool, zoomed)) > 5
    strongest = {row["number"]: [] for row in drawn["rows"]}
    for vote, after in zip(drawn["votes"], [*(v["position"] for v in drawn["votes"][1:]), drawn["tokens"]]):
        most = max(v for _, v in vote["votes"])
        for block, votes in vote["votes"]:
            if 5 * votes > 4 * most and vote["position"] < after:
                runs = strongest[block]
                if runs and runs[-1][1] == vote["position"]:
                    runs[-1][1] = after
                else:
                    runs.append([vote["position"], after])
    assert stretches("v5") == [strongest[row["number"]] for row in drawn["rows"]]
    for at in (100, 333, 500):
        shown.run(f"cursor({at})")
        said = shown.run("document.querySelector('.readout').innerText")
        zoomed = [str(row["number"] + 1) for row in drawn["rows"] if row["number"] is not None and state_at(row["states"], at) == "zoomed"]
        assert said.startswith(f"After {at} tokens: ") and f"Zoomed: {', '.join(zoomed) or 'none'}." in said
    assert shown.said == []


def test_the_keyboard_reaches_everything(made, shown):
    path, _ = made
    shown.load(path)
    focused = "document.activeElement.tagName + (document.activeElement.className || document.activeElement.type || '')"
    seen = []
    while "BUTTONrow" not in seen and len(seen) < 9:
        shown.press("Tab")
        seen.append(shown.run(focused))
    assert seen[0] == "SELECTselect-one" and "INPUTrange" in seen and seen[-1] == "BUTTONrow"
    shown.press("ArrowDown")
    shown.press("ArrowDown")
    assert shown.run(f"{ROWS}.indexOf(document.activeElement)") == 2
    shown.press("Enter")
    assert shown.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    before = shown.run("shown.at")
    shown.press("ArrowLeft")
    assert shown.run("shown.at") < before
    shown.press("ArrowUp")
    assert shown.run(f"{ROWS}.indexOf(document.activeElement)") == 1 and shown.said == []


@pytest.mark.parametrize("width, dark", [(1200, False), (1200, True), (360, False), (360, True)])
def test_it_fits_a_phone_and_both_schemes(made, shown, width, dark):
    path, _ = made
    shown.look(width, 800, dark)
    shown.load(path)
    shown.click(".row:nth-of-type(2)")
    assert shown.run("document.documentElement.scrollWidth") <= width, "nothing to scroll sideways"
    light = shown.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)")
    assert (light < 150) == dark
    assert shown.run("[...document.querySelectorAll('.row svg')].every(s => s.getBoundingClientRect().width > 200)")
    assert shown.said == []


def test_hostile_text_stays_text(tmp_path, shown):
    (tmp_path / "v.html").write_text(page(pictures(hostile_trace(tmp_path / "t.jsonl")), 0))
    shown.load(tmp_path / "v.html")
    for row in range(1, 5):
        shown.click(f".row:nth-of-type({row})")
    assert shown.run("document.querySelectorAll('script').length") == 2
    assert shown.run("document.querySelectorAll('img, iframe, object, link').length") == 0
    texts = shown.run("[...document.querySelectorAll('.more .text')].map(node => node.textContent)")
    assert len(texts) > 4 and all(text == HOSTILE.strip().replace("\ud800", text[text.index("owned") + 7]) for text in texts)
    assert shown.said == []


def test_nothing_else_could_run(made, shown):
    """The policy of the page, tried: a script that got in after all, and a load, are refused."""
    path, _ = made
    shown.load(path)
    shown.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))")
    shown.run("document.body.append(Object.assign(document.createElement('img'), {src: 'file:///nowhere.png'}))")
    assert shown.run("window.owned") is None
    assert any("Content Security Policy" in said for said in shown.said)
