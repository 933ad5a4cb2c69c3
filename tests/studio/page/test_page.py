"""The page in a real browser, on the miniature."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Server, chromium, serving
from root import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=20_000)
HERE = Path(__file__).parent
PLACES = ("datasets", "train", "runs", "generate", "weights")
pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no browser: install chromium, or set $CHROMIUM"
)


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as found:
        started = found.chromium.launch(executable_path=chromium())
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("studio")) as started:
        yield started


@pytest.fixture
def page(browser: "sync_api.Browser", server: Server) -> Iterator["sync_api.Page"]:
    """A page that fails its test on an error in its scripts, or a violation of the CSP."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if "Policy" in said.text else None)
    yield opened
    context.close()
    assert not wrong


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    with zipfile.ZipFile(ROOT / "demo/subject.zip") as archive:
        archive.extractall(folder)
    return sorted(folder.glob("*.png"))


def drop(page: "sync_api.Page", files: list[Path]) -> None:
    """Drops files onto the page, as a person does."""
    given = [[each.name, list(each.read_bytes())] for each in files]
    data = page.evaluate_handle(
        """(files) => {
            const data = new DataTransfer();
            for (const [name, bytes] of files)
                data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
            return data;
        }""",
        given,
    )
    page.dispatch_event("body", "drop", {"dataTransfer": data})


@pytest.mark.slow
def test_the_whole_way_from_images_to_generated_ones(
    page: "sync_api.Page", server: Server, images: list[Path], tmp_path: Path
) -> None:
    page.goto(server.address)
    expect(page.get_by_text("Start with a few images of one subject")).to_be_visible()

    # Drop 16 images.
    drop(page, images)
    page.get_by_label("Name").fill("robot")
    page.get_by_role("button", name="Create").click()
    expect(page.locator(".image-row")).to_have_count(16)
    expect(page.get_by_text("16 files added")).to_be_visible()

    # Captions by the keyboard alone: Ctrl+Enter saves and goes on.
    page.locator(".caption").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.type("a drawing of TOK")
    page.keyboard.press("Control+Enter")
    page.keyboard.type("TOK\non two lines")
    page.keyboard.press("Escape")
    expect(page.locator(".saved.good")).to_have_count(2)
    folder = server.folder / "datasets/robot"
    assert (folder / "00.txt").read_text().strip() == "a drawing of TOK"
    assert (folder / "01.txt").read_text().strip() == "TOK\non two lines"

    # Train; the draft survives a reload.
    page.get_by_role("link", name="Train", exact=True).last.click()
    page.locator("#field-steps").fill("20")
    page.get_by_label("Preview prompts").fill("a photo of TOK")
    page.get_by_label("Steps between previews").fill("5")
    page.get_by_label("Name of the run").fill("first")
    expect(page.get_by_text("20 steps from 16 images")).to_be_visible(timeout=60_000)
    page.reload()
    expect(page.locator("#field-steps")).to_have_value("20")
    expect(page.get_by_text("20 steps from 16 images")).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Start now").click()
    expect(page.get_by_role("heading", name="first")).to_be_visible()

    # Pause and resume, by what the server allows.
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("menuitem", name="Keep the memory").click()
    expect(page.get_by_text("paused, memory kept")).to_be_visible(timeout=40_000)
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("h1 + span .badge")).to_have_text("done", timeout=60_000)
    expect(page.locator(".preview img")).to_have_count(5, timeout=10_000)
    expect(page.locator(".uplot canvas").first).to_be_visible()

    # Generate with it, with the token completed, and take the image.
    page.get_by_role("link", name="Generate").last.click()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.press_sequentially("a photo of <")
    expect(page.get_by_role("option", name="<zwx>")).to_be_visible()
    prompt.press("Enter")
    expect(prompt).to_have_value("a photo of <zwx>")
    page.get_by_role("button", name="Generate", exact=True).click()
    picture = page.locator("button.picture")
    expect(picture).to_be_visible(timeout=60_000)
    picture.click()
    with page.expect_download() as got:
        page.get_by_role("link", name="Download").click()
    assert got.value.path().read_bytes().startswith(b"\x89PNG")
    page.get_by_role("button", name="Use these again").click()
    expect(prompt).to_have_value("a photo of <zwx>")

    # The weights.
    page.goto(f"{server.address}#/weights")
    page.get_by_role("button", name="Download").first.click()
    with page.expect_download() as got:
        page.get_by_role("menuitem", name="All").click()
    assert zipfile.is_zipfile(got.value.path())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: "sync_api.Page", server: Server, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(server.address)
    page.evaluate((HERE / "axe.min.js").read_text())
    for place in (*PLACES, "datasets/robot"):
        page.evaluate("(place) => { location.hash = `#/${place}`; }", place)
        expect(page.locator(f".screen.{place.split('/')[0]} h1")).to_be_visible()
        page.wait_for_timeout(300)
        found = page.evaluate("() => axe.run()")
        serious = [
            (place, each["id"], each["nodes"][0]["html"][:120])
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious


def test_the_page_catches_up_after_the_server_was_away(
    page: "sync_api.Page", server: Server
) -> None:
    page.goto(f"{server.address}#/datasets")
    expect(page.get_by_role("heading", name="Datasets")).to_be_visible()
    server.end()
    expect(page.get_by_text("No connection")).to_be_visible()
    server.start()
    expect(page.get_by_text("No connection")).to_be_hidden()


def test_nothing_is_wider_than_a_phone(page: "sync_api.Page", server: Server) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    for place in PLACES:
        page.goto(f"{server.address}#/{place}")
        expect(page.locator(f".screen.{place} h1")).to_be_visible()
        page.wait_for_timeout(200)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, place


def test_the_address_of_a_text_is_never_html(page: "sync_api.Page", server: Server) -> None:
    page.goto(f"{server.address}#/runs/{'<img src=x onerror=alert(1)>'}")
    expect(page.get_by_role("heading", name=re.compile("could not be shown"))).to_be_visible()
    assert page.locator("main img").count() == 0
