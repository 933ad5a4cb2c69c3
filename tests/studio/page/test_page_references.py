"""Reference images in a real browser; the generator has no model, but gets the request."""

import json
import re
from pathlib import Path

import pytest
from browser import chromium, small_page
from PIL import Image

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = api.expect
pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no browser: install Debian's chromium, or set $CHROMIUM"
)
SIZES = {"table": (60, 40), "cup": (40, 40), "lamp": (40, 80)}


def test_images_are_added_ordered_sent_shown_and_restored(tmp_path: Path) -> None:
    for name, size in SIZES.items():
        Image.effect_noise(size, 80).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = {name: str(tmp_path / f"{name}.png") for name in (*SIZES, "broken")}
    with small_page(tmp_path, 1400) as (server, page):
        page.goto(f"{server.address}#/generate")
        place = page.get_by_role("group", name="Reference images")
        thumbs = place.get_by_role("listitem").get_by_role("img")
        page.get_by_label("Prompt", exact=True).fill("put it on the table")
        expect(place).to_be_hidden()
        page.get_by_text("Steps, guidance, negative prompt").click()
        page.get_by_label("Base model").select_option("qwen-image-edit-2511")
        expect(place).to_be_visible()

        # Without an image, an editing model is refused at the place for them.
        generate = page.get_by_role("button", name=re.compile("^Generate"))
        page.get_by_label("Images", exact=True).fill("1")
        generate.click()
        expect(place.get_by_text("give 1 to 3")).to_be_visible()

        # Four files are chosen: one is no image, so three remain, which is the most.
        with page.expect_file_chooser() as chooser:
            place.get_by_role("button", name="Add images").click()
        chooser.value.set_files([files[name] for name in ("table", "broken", "cup", "lamp")])
        expect(thumbs).to_have_count(3)
        expect(place.get_by_text("image broken.png is not a")).to_be_visible()
        expect(place.get_by_role("button", name="Add images")).to_be_hidden()

        # By keys: the lamp becomes the first, the cup is removed, a name goes to the prompt.
        place.get_by_role("button", name="Move reference image 3 earlier").press("Enter")
        page.keyboard.press("Enter")
        expect(place.get_by_role("button", name="Move reference image 1 later")).to_be_focused()
        place.get_by_role("button", name="Remove reference image 3").press("Enter")
        expect(place.get_by_role("button", name="Remove reference image 2")).to_be_focused()
        place.get_by_role("button", name="Insert Picture 2").click()
        prompt = page.get_by_label("Prompt", exact=True)
        expect(prompt).to_have_value("put it on the table Picture 2")
        page.evaluate((Path(__file__).parent / "axe.min.js").read_text())
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("() => axe.run()")["violations"] == []

        # The request has the images in their order, and the size of the last one.
        generate.click()
        gallery = page.get_by_role("region", name="Gallery")
        gallery.get_by_role("button", name="put it").first.click()
        shown = page.get_by_role("dialog")
        expect(shown.get_by_role("img", name="Reference image 2")).to_be_visible()
        expect(shown.get_by_text("1248×832")).to_be_visible()
        [made] = json.loads(next(tmp_path.rglob("job.json")).read_text())["images"]
        sent = [Path(each) for each in made["inputs"]["reference_images"]]
        assert [each.read_bytes() for each in sent] == [
            Path(files[name]).read_bytes() for name in ("lamp", "table")
        ]

        # The generated image becomes a reference image; old settings restore the old ones.
        shown.get_by_role("button", name="Use as").click()
        page.get_by_role("menuitem", name="Reference image").click()
        expect(thumbs).to_have_count(3)
        gallery.get_by_role("button", name="Use again").click()
        expect(thumbs).to_have_count(2)
        old = [each.name for each in sent]
        assert [each.get_attribute("src") for each in thumbs.all()] == [
            f"/api/input_images/{each}" for each in old
        ]
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
