"""Pairs of images on the page: before and after an edit."""

import json
import shutil
from typing import Any

import pytest
from pages import SHORT, Page
from PIL import Image
from robot import caption, picture, put, rows, until_done
from starlette.testclient import TestClient

from studio import planner
from studio.folder import Studio
from trainer.commands import settings_of
from trainer.data import opener, read_dataset

TAKES = "?base=qwen-image-edit-2511&resolution=64"


def with_pairs(robot: TestClient, *names: str) -> None:
    """Images of different shades; those in `target/` have instructions."""
    for shade, name in enumerate(names):
        assert put(robot, name, picture(shade=shade)).status_code == 201
        if name.startswith("target/"):
            caption(robot, name, f"TOK number {shade}")


def texts(row: dict[str, Any]) -> list[str]:
    return [mark["text"] for mark in row["marks"] if mark["kind"] == "problem"]


def test_control_images_are_beside_their_targets_and_unmatched_ones_are_named(
    robot: TestClient, studio: Studio
) -> None:
    with_pairs(robot, "target/a.png", "target/b.png", "target/c.png", "target/d.png")
    with_pairs(robot, "control/a.png", "control_2/a.png", "control/b.png", "control/e.png")
    place = studio.datasets / "robot"
    shutil.copy(place / "target/b.png", place / "control/b.png")  # the same file
    whole = (place / "control/a.png").read_bytes()
    (place / "control/c.png").write_bytes(whole[:-40])
    robot.get(f"/api/datasets/robot{TAKES}")  # finds the changed files, which are then decoded
    until_done(studio)
    found = rows(robot, TAKES)
    assert found["target/a.png"]["controls"] == ["control/a.png", "control_2/a.png"]
    assert [name for name, row in found.items() if row["is_control"]] == [
        *("control/a.png", "control/b.png", "control/c.png", "control_2/a.png")
    ]
    assert found["control/a.png"]["bucket"] is None and not found["control/e.png"]["is_control"]
    assert texts(found["target/a.png"]) == []
    [broken] = texts(found["target/c.png"])
    assert broken.startswith("control/c.png: is truncated or damaged")
    [lacks] = texts(found["target/d.png"])
    assert lacks.startswith("no control image; put it into a folder control")
    assert texts(found["control/e.png"]) == ["control images without a training image"]
    assert "the image and its control image are the same file, so no edit is learned" in [
        mark["text"] for mark in found["target/b.png"]["marks"]
    ]
    about = robot.get("/api/datasets/robot?base=z-image").json()["problems"][0]["text"]
    assert about.startswith("3 images have control images, which z-image does not use: to train on")
    [summary] = robot.get("/api/datasets").json()["datasets"]
    assert (summary["images"], summary["captions"]) == (4, 4)


def test_a_control_image_is_no_duplicate_and_may_be_in_any_folder_of_the_dataset(
    robot: TestClient, studio: Studio
) -> None:
    place, image = studio.datasets / "robot", Image.effect_noise((8, 6), 90).resize((64, 48))
    (place / "old").mkdir()
    for number, name in enumerate(("old/a.png", "a.png", "b.png")):
        image.point([min(255, level + number) for level in range(256)]).save(place / name)
    for each in ("a", "b"):
        (place / f"{each}.txt").write_text("change TOK")
    query = "?base=qwen-image-2.1&resolution=64"
    robot.get(f"/api/datasets/robot{query}")
    until_done(studio)

    def shown(query: str) -> dict[str, tuple[list[str], bool, bool]]:
        found = rows(robot, query).items()
        return {n: (r["controls"], r["is_control"], "nearly" in str(r["marks"])) for n, r in found}

    assert all(same for _, _, same in shown(query).values())  # three usual images
    (place / "b.png").rename(studio.folder / "b.png")
    pair = {"a.png": (["old/a.png"], False, False), "old/a.png": ([], True, False)}
    assert shown(f"{query}&controls=old") == pair
    # What one edit makes is what the next one changes.
    (studio.folder / "b.png").rename(place / "b.png")
    edits = [("a.png", "old/a.png"), ("b.png", "a.png")]
    lines = [json.dumps({"file_name": one, "control_path": other}) for one, other in edits]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    assert shown(query) == pair | {"b.png": (["a.png"], False, False)}
    assert shown(f"{query}&controls=..,/etc") == shown(query)  # names alone are compared


def test_a_run_reads_control_images_of_folders_in_the_dataset_only(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = page.folder / "datasets" / "shapes"
    images = [each for each in sorted(place.iterdir()) if each.suffix != ".txt"]
    (place / "old").mkdir()
    for number, each in enumerate(images):
        (place / "old" / f"{each.stem}.png").write_bytes(picture(shade=number))
    (page.folder / "datasets" / "other").mkdir()
    asked = dict[str, Any]()

    async def ask(_: planner.Planner, **request: Any) -> dict[str, Any]:
        asked.update(request)
        return {"warnings": [], "disk_bytes": 0, "steps": 2, "seconds_per_step": None}

    monkeypatch.setattr(planner.Planner, "ask", ask)
    edits = {"base_model": "miniature-qwen", "controls": "old"}
    body = {"settings": SHORT | edits, "datasets": [{"name": "shapes", "token": "<zwx>"}]}
    plan = page.client.post("/api/plan", json=body).json()
    assert (plan["images"], plan["control_images"], asked["controls"]) == (len(images), 1, 1)

    folder = page.folder / "outputs" / page.new(**edits)
    settings = settings_of(folder)
    assert settings.control_folders == (folder / "dataset/shapes/old",)
    read = read_dataset(
        settings.dataset, *settings.caption_rules, opened=opener(settings.control_folders)
    )
    assert [len(each.controls) for each in read] == [1] * len(images)
    for wrong in ("/etc", "../other", str(place / "old"), ["old", "none"], "old,.."):
        refused = page.new(expect=422, **edits | {"controls": wrong})
        assert refused["field"] == "controls" and "must be folders in shapes" in refused["error"]
    assert page.new(expect=422, **edits | {"controls": 5})["field"] == "controls"
    refused = page.new(expect=422, **edits | {"base_model": "miniature-turbo"})
    assert refused["field"] == "controls" and "does not edit images" in refused["error"]
    # Those of the subject are for single images.
    body["settings"] |= {"preserve": "0.5", "preserve_prompts": "a red TOK"}
    answer = page.client.post("/api/plan", json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, "preserve_prompts")
