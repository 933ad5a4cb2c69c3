"""Pairs of images, before and after an edit, in a real browser."""

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
NAMES = ("target/a", "target/b", "target/c", "control/a", "control_2/a", "control/b", "control/e")


def test_control_images_are_shown_beside_their_targets(tmp_path: Path) -> None:
    for name in NAMES:
        file = tmp_path / "datasets" / "edits" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((96, 64), 80).save(file)
        if name.startswith("target/"):
            file.with_suffix(".txt").write_text(f"{name} TOK")
    with small_page(tmp_path, 1000) as (server, page):
        rows = page.get_by_role("list", name="Images and captions").get_by_role("listitem")

        # A base model that does not edit: the pairs are shown, and why they are not used.
        page.goto(f"{server.address}#/datasets/edits")
        expect(rows).to_have_count(4)  # targets, and the control image without one
        expect(
            page.get_by_text("2 images have control images, which miniature-turbo")
        ).to_be_visible()
        expect(page.get_by_role("button", name="Write captions")).to_be_disabled()

        # The form of Train has the folders of control images for base models that edit.
        page.get_by_role("link", name="Train", exact=True).last.click()
        page.get_by_text(re.compile(r"^All \d+ settings")).click()
        folders = page.get_by_label("Controls")
        expect(folders).to_be_hidden()
        page.get_by_role("radio", name="qwen-image-edit-2511").check()
        expect(folders).to_be_visible()
        folders.fill("old, new")
        page.get_by_text("As text, for the command line").click()
        expect(page.get_by_text('["datasets/edits/old","datasets/edits/new"]')).to_be_visible()
        folders.fill("")

        page.goto(f"{server.address}#/datasets/edits")
        expect(rows).to_have_count(4)
        first = rows.filter(has_text="target/a TOK")
        expect(first.get_by_role("button", name="Show control image")).to_have_count(2)
        expect(rows.filter(has_text="control/e.png")).to_contain_text("without a training image")
        expect(rows.filter(has_text="target/c TOK")).to_contain_text("no control image")
        expect(
            page.get_by_role("status").get_by_text("4 images · 3 control images")
        ).to_be_visible()
        first.get_by_role("button", name="Show control image control_2/a.png").click()
        side = page.get_by_role("complementary", name="Selected image")
        expect(side.get_by_role("heading", name="control_2/a.png")).to_be_visible()
        page.evaluate((Path(__file__).parent / "axe.min.js").read_text())
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("() => axe.run()")["violations"] == []

        # Removing a control image keeps the row, and Undo brings it back.
        side.get_by_role("button", name="Remove").click()
        expect(first.get_by_role("button", name="Show control image")).to_have_count(1)
        expect(side.get_by_role("heading", name="target/a.png")).to_be_visible()
        page.get_by_role("button", name="Undo").click()
        expect(first.get_by_role("button", name="Show control image")).to_have_count(2)
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
