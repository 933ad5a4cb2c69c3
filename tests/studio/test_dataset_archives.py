"""Archives that are added to a dataset, and a dataset as an archive."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from robot import caption, files, packed, picture, put, rows, until_done
from starlette.testclient import TestClient

from studio.app import application
from studio.folder import Studio


def test_an_archive_adds_images_and_captions_without_its_outer_folder(
    robot: TestClient, studio: Studio
) -> None:
    content = packed({"my dog/a.png": picture(), "my dog/a.txt": b"TOK", "my dog/x.pdf": b"%PDF"})
    answer = robot.put("/api/datasets/robot/archives/dog.zip", content=content)
    assert answer.status_code == 202
    task = until_done(studio)
    assert (task["id"], task["state"], task["done"], task["of"]) == (
        answer.json()["task"],
        "done",
        1,
        1,
    )
    assert rows(robot)["a.png"]["caption"] == "TOK"
    parts = studio.datasets / "robot/.studio/parts"
    assert list(parts.iterdir()) == []
    zipped = zipfile.ZipFile(io.BytesIO(robot.get("/api/datasets/robot/zip").content))
    assert zipped.namelist() == ["a.png", "a.txt"] and zipped.read("a.txt") == b"TOK"


def test_captions_of_other_programs_and_images_of_phones_are_shown(
    robot: TestClient, studio: Studio
) -> None:
    heic = (Path(__file__).parents[1] / "trainer/data/images/upright.heic").read_bytes()
    table = b'{"file_name": "a.png", "text": "TOK in a table"}\n' + b" " * 99
    members = {"a.png": picture(), "b.png": picture(), "b.caption": b"TOK beside"}
    members |= {"c.HEIC": heic, "metadata.jsonl": table}
    robot.put("/api/datasets/robot/archives/a.zip", content=packed(members))
    assert until_done(studio)["state"] == "done"
    found = rows(robot)
    captions = ["TOK in a table", "TOK beside", "a photo of TOK"]
    assert [each["caption"] for each in found.values()] == captions
    assert [each["default_caption"] for each in found.values()] == [False, False, True]
    assert found["c.HEIC"]["trained"] and found["c.HEIC"]["width"] == 64
    shown = robot.get("/api/datasets/robot/images/c.HEIC")
    assert shown.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(shown.content)).size == (64, 32)
    assert caption(robot, "a.png", "TOK written here", "none").status_code == 200
    assert rows(robot)["a.png"]["caption"] == "TOK written here"


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({"a.png": picture(), "../b.png": picture()}, "outside of the archive"),
        ({"a.txt/b.png": picture(), "CON.png": picture()}, "cannot be used"),
        ({"there.png": picture(), "new.png": picture()}, "in the dataset already: there.png"),
        ({"readme.md": b"hello"}, "contains no image: JPEG"),
    ],
)
def test_an_archive_with_a_problem_adds_nothing(
    robot: TestClient, studio: Studio, members: dict[str, bytes], error: str
) -> None:
    put(robot, "there.png")
    before = files(studio)
    robot.put("/api/datasets/robot/archives/a.zip", content=packed(members))
    task = until_done(studio)
    assert task["state"] == "failed" and error in task["error"]
    assert files(studio) == before


def test_a_damaged_archive_adds_nothing(robot: TestClient, studio: Studio) -> None:
    content = packed({f"{number}.png": os.urandom(5000) for number in range(9)})
    robot.put("/api/datasets/robot/archives/a.zip", content=content[:20000])
    assert until_done(studio)["state"] == "failed"
    assert files(studio) == []
    answer = robot.put("/api/datasets/robot/archives/a.zip", content=b"hello")
    assert answer.status_code == 415


def test_parts_of_a_killed_server_are_removed_at_the_start(tmp_path: Path) -> None:
    parts = tmp_path / "datasets/robot/.studio/parts"
    parts.mkdir(parents=True)
    (parts / "0.part").write_bytes(b"half")
    with TestClient(application(Studio(tmp_path)), "http://127.0.0.1"):
        assert not parts.exists()
