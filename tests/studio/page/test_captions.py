"""Captions in the page: whatever happens, no text is lost."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Server, chromium, serving
from root import ROOT

from families.captioners import ON_CPU

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no browser: install chromium, or set $CHROMIUM"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studio")
    with zipfile.ZipFile(ROOT / "demo/subject.zip") as archive:
        archive.extractall(folder / "datasets/robot")
    (folder / "models").mkdir()
    captioner = {"MODEL_VAULT": str(folder / "models"), "SMALL_CAPTIONER": str(folder)}
    with serving(folder, small=True, **captioner) as started:
        yield started


@pytest.fixture(scope="module")
def context(server: Server) -> Iterator["sync_api.BrowserContext"]:
    with sync_api.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=chromium())
        yield browser.new_context(viewport={"width": 1280, "height": 900})
        browser.close()


def caption(page: "sync_api.Page", name: str = "00.png") -> "sync_api.Locator":
    """The caption of an image, which need not be the first: images with findings are."""
    return page.get_by_role("button", name=re.compile(f"^Caption of {re.escape(name)}"))


@pytest.fixture
def captions(server: Server) -> Path:
    """The dataset's folder; the first two captions as they were at first."""
    folder = server.folder / "datasets/robot"
    for name in ("00.txt", "01.txt"):
        (folder / name).write_text("a photo of TOK")
    return folder


@pytest.fixture
def page(
    context: "sync_api.BrowserContext", server: Server, captions: Path
) -> Iterator["sync_api.Page"]:
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.goto(f"{server.address}#/datasets/robot")
    opened.locator(".caption").first.wait_for()
    yield opened
    opened.close()
    assert not wrong


def test_a_text_is_saved_half_a_second_after_the_last_key(
    page: "sync_api.Page", captions: Path
) -> None:
    caption(page).click()
    page.keyboard.type(" at night")
    expect(page.locator(".saved.good")).to_have_text("saved")
    assert (captions / "00.txt").read_text() == "a photo of TOK at night"


def test_a_text_is_saved_when_the_screen_is_left_at_once(
    page: "sync_api.Page", captions: Path
) -> None:
    caption(page).click()
    page.keyboard.type(" by the sea")
    page.evaluate("() => { location.hash = '#/datasets'; }")
    expect(page.get_by_role("heading", name="Datasets")).to_be_visible()
    for _ in range(100):
        if (captions / "00.txt").read_text() == "a photo of TOK by the sea":
            return
        page.wait_for_timeout(50)
    raise AssertionError((captions / "00.txt").read_text())


def test_a_text_that_could_not_be_saved_is_there_when_the_screen_is_opened_again(
    page: "sync_api.Page", captions: Path
) -> None:
    page.route("**/captions/**", lambda route: route.abort())
    caption(page).click()
    page.keyboard.type(" in the rain")
    page.evaluate("() => { location.hash = '#/datasets'; }")
    expect(page.locator(".toast.bad")).to_contain_text("The caption of 00.png is not saved")
    page.unroute("**/captions/**")
    page.evaluate("() => { location.hash = '#/datasets/robot'; }")
    expect(caption(page)).to_contain_text("a photo of TOK in the rain")
    expect(page.locator(".saved.good")).to_have_text("saved")
    assert (captions / "00.txt").read_text() == "a photo of TOK in the rain"


def test_the_link_to_the_content_stays_on_the_screen(page: "sync_api.Page", server: Server) -> None:
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    assert page.url == f"{server.address}#/datasets/robot"


def test_a_caption_that_was_changed_elsewhere_keeps_both_texts_until_one_is_chosen(
    page: "sync_api.Page", captions: Path
) -> None:
    caption(page).click()
    (captions / "00.txt").write_text("theirs, of TOK")
    page.keyboard.type(", mine")
    expect(page.locator(".theirs")).to_have_text("theirs, of TOK")
    assert (captions / "00.txt").read_text() == "theirs, of TOK"
    page.get_by_role("button", name="Keep mine").click()
    expect(page.locator(".saved.good")).to_have_text("saved")
    assert (captions / "00.txt").read_text() == "a photo of TOK, mine"


def test_a_replacement_is_shown_first_and_undone_as_a_whole(
    page: "sync_api.Page", captions: Path
) -> None:
    page.get_by_role("button", name="More", exact=True).click()
    page.get_by_role("menuitem", name="Find and replace").click()
    page.get_by_label("Find", exact=True).fill("a photo")
    page.get_by_label("Replace with").fill("a picture")
    expect(page.locator(".change ins").first).to_have_text("a picture of TOK")
    assert (captions / "00.txt").read_text() == "a photo of TOK"
    page.get_by_role("button", name="Replace all").click()
    expect(caption(page)).to_have_text("a picture of TOK")
    page.get_by_role("button", name="Undo").click()
    expect(caption(page)).to_have_text("a photo of TOK")
    assert (captions / "01.txt").read_text() == "a photo of TOK"


def test_a_removed_image_comes_back_with_its_caption(page: "sync_api.Page", captions: Path) -> None:
    caption(page).focus()
    page.keyboard.press("Delete")
    expect(page.locator(".image-row")).to_have_count(15)
    assert not (captions / "00.txt").exists()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".image-row")).to_have_count(16)
    assert (captions / "00.txt").read_text() == "a photo of TOK"


def test_a_refused_setting_is_said_at_its_field_and_the_form_survives_a_reload(
    page: "sync_api.Page", server: Server
) -> None:
    page.goto(f"{server.address}#/train/robot")
    page.locator("#field-steps").fill("abc")
    error = page.locator("[data-field=steps] .error")
    expect(error).to_have_text("steps is 'abc'; it must be a whole number", timeout=60_000)
    expect(page.get_by_role("button", name="Start now")).to_be_disabled()
    page.reload()
    expect(page.locator("#field-steps")).to_have_value("abc")


def test_captions_are_written_by_a_model_and_undone(
    page: "sync_api.Page", captions: Path, server: Server
) -> None:
    (captions / "01.txt").unlink()
    page.reload()
    write = page.get_by_role("button", name="Write captions")
    box = page.get_by_role("dialog", name="Write captions")
    write.click()  # without a model
    expect(box).to_contain_text("qwen3-vl-2b, which writes the captions for miniature-turbo, is")
    expect(box.locator("pre")).to_have_text("python -m families.download qwen3-vl-2b")
    expect(box.get_by_role("button", name="Write captions")).to_be_disabled()
    page.keyboard.press("Escape")

    (server.folder / "models" / ON_CPU.hub_id).mkdir(parents=True)
    (server.folder / "slow").touch()
    write.focus()
    page.keyboard.press("Enter")
    expect(box.get_by_text("Only those without a caption: 1")).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(box).to_contain_text("15 captions will be replaced, also those that you have written.")
    page.evaluate((Path(__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("() => axe.run(document.querySelector('dialog'))")
    assert [each["id"] for each in found["violations"]] == []
    page.keyboard.press("Enter")
    expect(page.get_by_text(re.compile(r"^Writing captions: [1-9]\d* of 16"))).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    said = page.get_by_text(re.compile(r"^Canceled. \d+ captions? written by qwen3-vl-2b"))
    expect(said).to_be_visible()
    expect(caption(page)).to_contain_text("lamps")

    (server.folder / "slow").unlink()
    write.click()
    box.get_by_label("All: 16").check()
    page.set_viewport_size({"width": 360, "height": 740})
    assert box.evaluate("(each) => each.scrollWidth <= each.clientWidth && each.clientWidth < 360")
    box.get_by_role("button", name="Write captions").click()
    expect(page.get_by_text(re.compile("They leave out: robot, red, round head"))).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1280, "height": 900})
    expect(page.locator(".caption", has_text="lamps")).to_have_count(16)
    mark = page.locator(".marks .mark").first.bounding_box()
    assert mark is not None and mark["width"] > 300
    page.get_by_role("button", name="Undo all").click()
    expect(page.locator(".caption", has_text="lamps")).not_to_have_count(16)
