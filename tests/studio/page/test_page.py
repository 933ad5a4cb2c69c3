"""The page in a real browser, on the miniature: one way through, reconnection, access."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import Server, chromium, serving
from root import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = api.expect
expect.set_options(timeout=20_000)
PLACES = ("datasets", "train", "runs", "generate", "weights")
TOKEN = "<zwx>"
pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no browser: install Debian's chromium, or set $CHROMIUM"
)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with api.sync_playwright() as found:
        started = found.chromium.launch(executable_path=chromium())
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One studio for all tests here; the first test fills it."""
    with serving(tmp_path_factory.mktemp("studio")) as started:
        yield started


@pytest.fixture
def wrong() -> list[str]:
    """What the browser's console says; the test fails if something stays in it."""
    return []


@pytest.fixture
def page(browser: "Browser", server: Server, wrong: list[str]) -> Iterator["Page"]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield opened
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo's 16 images, without captions."""
    folder = tmp_path_factory.mktemp("images")
    with zipfile.ZipFile(ROOT / "demo" / "subject.zip") as archive:
        archive.extractall(folder)
    return sorted(folder.glob("*.png"))


def drop(page: "Page", files: list[Path]) -> None:
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


def go(page: "Page", server: Server, place: str) -> None:
    """Opens a screen anew, and waits for it."""
    page.goto("about:blank")
    page.goto(f"{server.address}#/{place}")
    expect(page.locator(f".screen.{place.split('/')[0]} h1").first).to_be_visible()


def test_the_way_from_images_to_a_generated_image(
    page: "Page", server: Server, images: list[Path]
) -> None:
    page.goto(server.address)
    expect(page.get_by_role("heading", name=re.compile("Start with a few images"))).to_be_visible()

    # Sixteen images are dropped.
    drop(page, images)
    page.get_by_role("dialog").get_by_label("Name").fill("robot")
    page.get_by_role("button", name="Create").click()
    rows = page.get_by_role("list", name="Images and captions").get_by_role("listitem")
    expect(rows).to_have_count(16)

    # A caption is written; the file has it.
    page.get_by_role("button", name=re.compile("^Caption of 00.png")).click()
    page.get_by_role("textbox", name="Caption of 00.png").fill("a drawing of TOK")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Caption of 00.png: a drawing of TOK")).to_be_visible()
    edited = rows.filter(has_text="a drawing of TOK")
    expect(edited.get_by_text("saved", exact=True)).to_be_visible()
    caption = server.folder / "datasets" / "robot" / "00.txt"
    assert caption.read_text().strip() == "a drawing of TOK"

    # The form survives a reload. Then 12 steps.
    go(page, server, "train/robot")
    steps = page.get_by_role("textbox", name=re.compile("^Steps(?! between)"))
    steps.fill("12")
    page.get_by_role("textbox", name=re.compile("^Preview prompts")).fill("a photo of TOK")
    page.get_by_role("textbox", name=re.compile("^Steps between previews")).fill("6")
    page.get_by_text(re.compile(r"^All \d+ settings")).click()
    for name, value in (("Batch size", "1"), ("Validation every", "12"), ("Preserve(?! p)", "off")):
        page.get_by_role("textbox", name=re.compile(f"^{name}")).fill(value)
    page.get_by_label("Name of the run").fill("first")
    page.wait_for_timeout(600)
    page.reload()
    expect(steps).to_have_value("12")
    expect(page.get_by_label("Name of the run")).to_have_value("first")
    page.get_by_role("button", name="Start now").click()
    expect(page.get_by_role("heading", name="first", exact=True)).to_be_visible(timeout=40_000)

    # Paused, with its memory, and resumed. The previews come while it trains.
    page.get_by_role("button", name="Pause", exact=True).click(timeout=60_000)
    page.get_by_role("menuitem", name=re.compile("Keep the memory")).click()
    page.get_by_role("button", name="Resume", exact=True).click(timeout=60_000)
    previews = page.get_by_role("img", name=re.compile(r"a photo of .*step \d+"))
    expect(previews.nth(1)).to_be_visible(timeout=60_000)
    generate = page.get_by_role("main").get_by_role("link", name=re.compile("^Generate"))
    expect(generate.first).to_be_visible(timeout=90_000)

    # An image with it; the token is completed.
    page.goto(f"{server.address}#/generate")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.press_sequentially("a photo of <")
    expect(page.get_by_role("option", name=TOKEN)).to_be_visible()
    prompt.press("Enter")
    expect(prompt).to_have_value(f"a photo of {TOKEN}")
    page.get_by_label("Images", exact=True).fill("2")
    page.get_by_role("button", name="Generate 2 images").click()
    pictures = page.get_by_role("region", name="Gallery").get_by_role("img")
    expect(pictures).to_have_count(2, timeout=60_000)
    pictures.first.click()
    with page.expect_download() as download:
        page.get_by_role("dialog").get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    page.get_by_role("button", name="Use these again").click()
    expect(page.get_by_role("button", name="Keep this seed")).to_have_attribute(
        "aria-pressed", "true"
    )

    # To the trash, and back.
    page.get_by_role("button", name="Move to the trash").click()
    expect(pictures).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(pictures).to_have_count(2)

    # The weights, to take along.
    go(page, server, "weights")
    page.get_by_role("button", name="Download").first.click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name=re.compile("^Everything")).click()
    assert zipfile.is_zipfile(download.value.path())


def test_screens_are_accessible_in_light_and_dark_and_fit_a_phone(
    page: "Page", server: Server
) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.goto(server.address)
    page.evaluate((Path(__file__).parent / "axe.min.js").read_text())
    run, found, wide = run_of(server), [], []
    for place in (*PLACES, "datasets/robot", f"runs/{run}", f"weights/runs%2F{run}%2Ffinal"):
        page.evaluate("(place) => { location.hash = `#/${place}`; }", place)
        expect(page.locator(f".screen.{place.split('/')[0]} h1").first).to_be_visible()
        page.wait_for_load_state("networkidle")
        for scheme, rules in (("light", "{}"), ("dark", "{ runOnly: ['color-contrast'] }")):
            page.emulate_media(color_scheme=scheme)
            for each in page.evaluate(f"() => axe.run({rules})")["violations"]:
                if each["impact"] in ("serious", "critical"):
                    nodes = [node["html"][:140] for node in each["nodes"][:2]]
                    found.append((place, scheme, each["id"], nodes))
        page.set_viewport_size({"width": 360, "height": 740})
        if page.evaluate("() => document.documentElement.scrollWidth") > 360:
            wide.append(place)
        page.set_viewport_size({"width": 1280, "height": 900})
    assert (found, wide) == ([], [])


def run_of(server: Server) -> str:
    """The run of the first test."""
    found = sorted(each.name for each in (server.folder / "outputs").glob("*-robot-*"))
    if not found:
        pytest.skip("the first test made no run")
    return found[0]


def test_the_page_goes_on_after_a_restart_of_the_server(
    page: "Page", server: Server, wrong: list[str]
) -> None:
    go(page, server, "runs")
    server.end()
    expect(page.get_by_text("No connection")).to_be_visible()
    server.start()
    expect(page.get_by_text("No connection")).to_be_hidden()
    made = server.folder / "datasets" / "later"
    made.mkdir(parents=True)
    screens = page.get_by_role("navigation", name="Screens")
    screens.get_by_role("link", name="Datasets").click()
    expect(page.get_by_role("heading", name="later")).to_be_visible()
    away = ("ERR_", "Failed to fetch")
    wrong[:] = [each for each in wrong if not any(words in each for words in away)]


def test_the_policy_of_the_page_is_active(page: "Page", server: Server, wrong: list[str]) -> None:
    answer = page.goto(server.address)
    policy = answer.headers["content-security-policy"] if answer else ""
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; } catch { return 'refused'; } }"
    ) == ("refused")
    page.goto(f"{server.address}#/runs/%3Cimg%20src=x%20onerror=alert(1)%3E")
    expect(page.get_by_role("heading", name="There is no such run")).to_be_visible()
    assert page.get_by_role("main").locator("img[onerror]").count() == 0
    expected = ("TrustedHTML", "Failed to load resource", "there is no run")
    wrong[:] = [each for each in wrong if not any(words in each for words in expected)]
