"""From images to a generated image without a mouse, while another browser watches."""

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import chromium, serving
from root import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Page

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = api.expect
MOST_TABS = 120
pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no browser: install Debian's chromium, or set $CHROMIUM"
)
NAME = """() => {
    const at = document.activeElement, label = at.labels?.[0];
    return at.getAttribute("aria-label") ?? label?.textContent ?? at.textContent ?? "";
}"""


def tab_to(page: "Page", name: str) -> None:
    """Presses Tab until the focus is on a control whose name matches."""
    seen = []
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        seen.append(str(page.evaluate(NAME)).strip()[:60])
        if re.match(name, seen[-1]):
            assert page.evaluate("() => document.activeElement.matches(':focus-visible')")
            return
    raise AssertionError(f"no control is named {name}: {seen}")


def press(page: "Page", *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


@pytest.mark.slow
def test_everything_works_without_a_mouse_and_a_second_browser_sees_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(ROOT / "demo/subject.zip") as archive:
        archive.extractall(tmp_path / "datasets/robot")
    with serving(tmp_path) as server, api.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=chromium())
        page, other = (browser.new_context().new_page() for _ in range(2))
        for each in (page, other):
            each.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.goto(server.address)
        other.goto(f"{server.address}#/runs")

        # A caption, and the next one.
        tab_to(page, "robot")
        press(page, "Enter")
        expect(page.get_by_role("heading", name="robot")).to_be_visible()
        tab_to(page, "Caption of 00.png")
        press(page, "Enter", "Control+a")
        page.keyboard.type("a photo of TOK, typed")
        press(page, "Control+Enter")
        expect(page.get_by_role("textbox", name="Caption of 01.png")).to_be_focused()
        press(page, "Escape")
        caption = tmp_path / "datasets/robot/00.txt"
        expect(page.get_by_role("button", name=re.compile("typed"))).to_be_visible()
        assert caption.read_text().strip() == "a photo of TOK, typed"

        # A short training.
        press(page, "g", "t")
        expect(page.get_by_role("heading", name="Train", exact=True)).to_be_visible()
        tab_to(page, r"Steps(?! between)")
        page.keyboard.type("12")
        tab_to(page, "Steps between previews")
        page.keyboard.type("12")
        tab_to(page, "Name of the run")
        page.keyboard.type("by keys")
        tab_to(page, "Start now")
        press(page, "Enter")
        for each in (page, other):
            expect(each.get_by_text("by keys").first).to_be_visible()

        # Paused by keys; the other browser shows it and resumes.
        expect(page.get_by_role("button", name="Pause", exact=True)).to_be_visible()
        tab_to(page, "Pause")
        press(page, "Enter")
        expect(page.get_by_role("menuitem", name=re.compile("Keep the memory"))).to_be_focused()
        press(page, "Enter")
        other.get_by_role("link", name=re.compile("by keys")).first.click()
        other.get_by_role("button", name="Resume", exact=True).click()
        ended = page.get_by_role("main").get_by_role("link", name=re.compile("^Generate"))
        expect(ended.first).to_be_visible(timeout=180_000)
        expect(other.get_by_text("done").first).to_be_visible()

        # An image.
        press(page, "g", "e")
        expect(page.get_by_role("heading", name="Generate", exact=True)).to_be_visible()
        tab_to(page, "Prompt")
        page.keyboard.type("a photo of <")
        press(page, "Enter", "Control+Enter")
        gallery = page.get_by_role("region", name="Gallery").get_by_role("img")
        expect(gallery.first).to_be_visible(timeout=120_000)
        browser.close()
