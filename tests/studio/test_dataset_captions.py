"""Captions on the page: edited, found and replaced."""

import time
from typing import Any

import pytest
from robot import caption, files, picture, put, rows
from starlette.testclient import TestClient

from studio.folder import Studio


def test_two_tabs_never_lose_a_caption(robot: TestClient) -> None:
    put(robot, "a.png")
    first = caption(robot, "a.png", "TOK\nin two lines", "none").json()
    assert rows(robot)["a.png"]["caption"] == "TOK\nin two lines"
    assert caption(robot, "a.png", "TOK, mine", first["caption_version"]).status_code == 200
    answer = caption(robot, "a.png", "TOK, theirs", first["caption_version"])
    assert answer.status_code == 412
    both = answer.json()
    assert (both["mine"], both["theirs"]) == ("TOK, theirs", "TOK, mine")
    assert caption(robot, "a.png", "TOK, both", both["caption_version"]).status_code == 200
    assert rows(robot)["a.png"]["caption"] == "TOK, both"


def test_two_tabs_cannot_both_write_the_first_caption(robot: TestClient) -> None:
    put(robot, "a.png")
    version = rows(robot)["a.png"]["caption_version"]
    assert caption(robot, "a.png", "TOK, mine", version).status_code == 200
    assert caption(robot, "a.png", "TOK, theirs", version).status_code == 412


def test_a_caption_file_finds_its_image_by_name(robot: TestClient) -> None:
    put(robot, "a.png")
    assert caption(robot, "a.txt", "TOK outside").status_code == 200
    assert rows(robot)["a.png"]["caption"] == "TOK outside"
    assert caption(robot, "b.txt", "TOK").status_code == 404
    assert caption(robot, "b.png", "TOK").status_code == 404


def test_an_empty_caption_is_the_default_one(robot: TestClient, studio: Studio) -> None:
    put(robot, "a.png")
    caption(robot, "a.png", "TOK")
    answer = caption(robot, "a.png", " ").json()
    assert answer["default_caption"] and answer["caption_version"] == "none"
    assert "a.txt" not in files(studio)
    # The page names the one of the form.
    query = "?default_caption=make%20it%20red"
    [row] = robot.get(f"/api/datasets/robot{query}").json()["images"]
    assert row["caption"] == "make it red" and row["default_caption"]


def test_500_captions_are_replaced_in_a_second_and_undone_as_a_whole(
    robot: TestClient, studio: Studio
) -> None:
    place = studio.datasets / "robot"
    texts = {f"{number:03d}": f"TOK in red, red {number}" for number in range(500)}
    for name, text in texts.items():
        (place / f"{name}.png").write_bytes(picture(8, 8))
        (place / f"{name}.txt").write_text(text)
    asked = {"find": "red", "with": "blue", "word": True, "dry_run": True}
    shown = robot.post("/api/datasets/robot/replace", json=asked).json()
    assert len(shown["changes"]) == 500 and shown["undo"] is None
    assert shown["changes"][7]["after"] == "TOK in blue, blue 7"
    assert (place / "007.txt").read_text() == texts["007"]
    start = time.perf_counter()
    done = robot.post("/api/datasets/robot/replace", json=asked | {"dry_run": False}).json()
    assert time.perf_counter() - start < 3  # one second on a machine that does nothing else
    assert (place / "499.txt").read_text() == "TOK in blue, blue 499"
    undo = {"undo": done["undo"]}
    caption(robot, "003.png", "TOK by hand")
    refused = robot.post("/api/datasets/robot/undo", json=undo)
    assert refused.status_code == 409 and "003.png" in refused.json()["error"]
    caption(robot, "003.png", "TOK in blue, blue 3")
    assert robot.post("/api/datasets/robot/undo", json=undo).json() == {"undone": 500}
    assert {each.stem: each.read_text() for each in place.glob("*.txt")} == texts


def test_regular_expressions_are_checked_and_bounded(
    robot: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(robot, "a.png")
    caption(robot, "a.png", "TOK aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
    monkeypatch.setattr("studio.substitution.SECONDS", 1)

    def replace(find: str, text: str) -> Any:
        asked = {"find": find, "with": text, "regex": True, "dry_run": True}
        return robot.post("/api/datasets/robot/replace", json=asked)

    assert replace("(T)(O)", r"\2\1").json()["changes"][0]["after"].startswith("OTK")
    assert "invalid" in replace("(", "").json()["error"]
    assert "invalid" in replace("T", r"\9").json()["error"]
    assert "longer than" in replace("(a+)+$", "").json()["error"]
