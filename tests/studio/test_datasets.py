"""Datasets on the page: images, problems, names."""

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from pages import SHORT
from PIL import Image, ImageOps
from robot import caption, files, picture, put, rows, until_done
from starlette.testclient import TestClient

from families.loading import load_family
from families.registry import BASES
from studio import uploads
from studio.app import application
from studio.folder import Studio
from studio.jobs import forget


def test_an_uploaded_image_has_size_thumbnail_and_default_caption(
    robot: TestClient, studio: Studio
) -> None:
    answer = put(robot, "a b.png", picture(640, 400))
    assert answer.status_code == 201
    row = rows(robot)["a b.png"]
    assert (row["width"], row["height"]) == (640, 400)
    assert row["caption"] == "a photo of TOK" and row["default_caption"]
    assert row["version"] == answer.json()["version"]
    assert len(list((studio.datasets / "robot/.studio/thumbs").iterdir())) == 1
    small = robot.get(f"/api/datasets/robot/thumbs/a b.png?v={row['version']}")
    assert "immutable" in small.headers["cache-control"]
    assert Image.open(io.BytesIO(small.content)).size == (320, 200)
    whole = robot.get("/api/datasets/robot/images/a b.png")
    assert whole.content == picture(640, 400) and whole.headers["content-type"] == "image/png"
    assert robot.get("/api/datasets").json()["datasets"][0]["images"] == 1


def test_near_duplicates_are_marked_and_one_background_is_about_the_whole(
    robot: TestClient,
) -> None:
    for number in range(6):
        put(robot, f"flat{number}.png", picture(64, 48))
    image = Image.effect_noise((8, 6), 90).resize((64, 48)).convert("RGB")
    for name, each in (("a.png", image), ("b.png", ImageOps.mirror(image))):
        file = io.BytesIO()
        each.save(file, "PNG")
        put(robot, name, file.getvalue())
    found = robot.get("/api/datasets/robot").json()
    marks = {row["name"]: row["marks"] for row in found["images"]}
    assert [name for name, each in marks.items() if each] == ["a.png", "b.png"]
    assert marks["a.png"][0]["text"].startswith("2 images are nearly the same")
    (whole,) = found["problems"]
    assert (whole["kind"], whole["image"]) == ("suggestion", None)
    assert whole["text"].startswith("6 of 8 images have the same border")


def test_an_image_is_replaced_only_when_asked_and_the_old_one_can_be_restored(
    robot: TestClient, studio: Studio
) -> None:
    put(robot, "a.png")
    assert put(robot, "a.png", picture(32, 32)).status_code == 409
    assert put(robot, "a.png", picture(32, 32), "?replace=1").status_code == 201
    row = rows(robot)["a.png"]
    assert row["width"] == 32
    assert len(list(studio.trash.iterdir())) == 1
    thumbs = studio.datasets / "robot/.studio/thumbs"
    assert [each.stem for each in thumbs.iterdir()] == [row["version"]]  # not of the old one


def test_a_removed_image_takes_its_caption_with_it_and_comes_back(
    robot: TestClient, studio: Studio
) -> None:
    put(robot, "a.png")
    caption(robot, "a.png", "TOK outside")
    trash = robot.delete("/api/datasets/robot/images/a.png").json()["trash"]
    assert not any(name.startswith("a.") for name in files(studio))
    assert robot.post(f"/api/trash/{trash}/restore").status_code == 200
    assert rows(robot)["a.png"]["caption"] == "TOK outside"


def test_a_dataset_is_renamed_deleted_and_restored(robot: TestClient) -> None:
    put(robot, "a.png")
    assert robot.post("/api/datasets", json={"name": "robot"}).status_code == 409
    assert robot.patch("/api/datasets/robot", json={"name": "Roboter ü"}).status_code == 200
    trash = robot.delete("/api/datasets/Roboter ü").json()["trash"]
    assert robot.get("/api/datasets").json() == {"datasets": []}
    robot.post(f"/api/trash/{trash}/restore")
    assert robot.get("/api/datasets/Roboter ü").json()["images"][0]["name"] == "a.png"


def test_bad_uploads_leave_nothing(robot: TestClient, studio: Studio) -> None:
    before = files(studio)
    assert put(robot, "a.svg").status_code == 415
    assert put(robot, "a.png", b"not an image").status_code == 422
    assert put(robot, "a.png", picture()[:60]).status_code == 422
    assert "too small" in put(robot, "a.png", picture(4, 4)).json()["error"]
    big = {"Content-Length": str(5 << 30)}
    for path in ("images/a.png", "archives/a.zip"):
        answer = robot.put(f"/api/datasets/robot/{path}", content=b"x", headers=big)
        assert answer.status_code == 413
    answer = robot.put(
        "/api/datasets/robot/captions/a.png", content=b"x", headers={**big, "If-Match": "*"}
    )
    assert answer.status_code == 413
    assert files(studio) == before


def test_a_body_that_grows_beyond_the_limit_is_refused(
    robot: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_MEMBER_BYTES", 1000)

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(100)

    answer = robot.put("/api/datasets/robot/images/a.png", content=chunks())
    assert answer.status_code == 413
    assert files(studio) == []


def test_a_full_disk_is_said_before_anything_is_written(
    robot: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(studio.folder)
    values = list(real)
    values[4] = 10  # free blocks
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
    answer = put(robot, "a.png")
    assert answer.status_code == 507 and "free disk space" in answer.json()["what_to_do"]
    assert files(studio) == []


def test_what_the_trainer_says_is_beside_the_image(robot: TestClient, studio: Studio) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(robot, name, picture(100, 60))
    caption(robot, "a.png", "TOK outside")
    answer = caption(robot, "b.png", "a robot, <lora:x:1>")
    (studio.datasets / "robot/d.jpg").write_bytes(b"nothing")
    (studio.datasets / "robot/orphan.txt").write_text("TOK")
    robot.get("/api/datasets/robot")
    until_done(studio)
    found = robot.get("/api/datasets/robot?base=z-image-turbo&resolution=512").json()
    marks = {row["name"]: " ".join(m["text"] for m in row["marks"]) for row in found["images"]}
    assert "smaller than resolution 512" in marks["a.png"]
    assert "does not mention the subject" in marks["b.png"]
    assert "syntax of other programs" in marks["b.png"]
    assert "syntax of other programs" in str(answer.json()["marks"])
    assert "cannot be opened" in marks["d.jpg"]
    whole = [each["text"] for each in found["problems"] if each["image"] is None]
    assert any("orphan.txt" in text for text in whole)
    bucket = found["images"][0]["bucket"]
    assert bucket["width"] % 16 == 0 and bucket["upscaled"] > 4
    left, top, right, bottom = bucket["crop"]
    assert 0 <= left < right <= 100 and (top, bottom) == (0, 60) or (left, right) == (0, 100)


def test_masks_that_training_uses_are_not_called_ignored(robot: TestClient) -> None:
    def said() -> str:
        found = robot.get("/api/datasets/robot").json()
        marks = [mark for row in found["images"] for mark in row["marks"]]
        return " ".join(each["text"] for each in [*marks, *found["problems"]])

    for name in ("a.png", "b.png", "a_mask.png"):
        put(robot, name)
    assert "masks are not used: 1 of 2 images have a mask" in said()
    put(robot, "b_mask.png")
    assert "mask" not in said()


def test_buckets_of_a_base_have_its_multiple(robot: TestClient) -> None:
    put(robot, "a.png", picture(400, 300))
    row = rows(robot, "?base=miniature-turbo")["a.png"]
    assert (row["bucket"]["width"], row["bucket"]["height"]) == (72, 56)
    for base in BASES.values():
        if base.included is not None and (base.included / "vae").is_dir():
            assert load_family(base).resolution_multiple == base.size_multiple


def test_images_in_folders_and_of_the_user_are_found(robot: TestClient, studio: Studio) -> None:
    place = studio.datasets / "robot/fox"
    place.mkdir()
    (place / "1.png").write_bytes(picture())
    (place / "1.txt").write_text("TOK runs")
    assert rows(robot)["fox/1.png"]["caption"] == "TOK runs"
    until_done(studio)
    assert robot.get("/api/datasets/robot/thumbs/fox%2F1.png").status_code == 200
    assert caption(robot, "fox%2F1.png", "TOK sits").status_code == 200
    assert (place / "1.txt").read_text() == "TOK sits"


def test_images_without_a_suffix_and_captions_of_tables_are_what_training_reads(
    robot: TestClient, studio: Studio
) -> None:
    place = studio.datasets / "robot"
    for name in ("photo", "b.png", "c.png", "d.png"):
        (place / name).write_bytes(picture())
    (place / "README").write_text("not an image")
    table = "".join(
        json.dumps({"file_name": name, "text": f"TOK, {name}"}) + "\n"
        for name in ("photo", "b.png")
    )
    (place / "metadata.jsonl").write_text(table)
    (place / "c.caption").write_text("TOK, of another program")
    (place / "d.txt").write_text(" ")
    found = rows(robot)
    assert {n: (r["caption"], r["caption_source"]) for n, r in found.items()} == {
        "b.png": ("TOK, b.png", "metadata.jsonl"),
        "c.png": ("TOK, of another program", "c.caption"),
        "d.png": ("a photo of TOK", None),
        "photo": ("TOK, photo", "metadata.jsonl"),
    }
    (listed,) = robot.get("/api/datasets").json()["datasets"]
    assert (listed["images"], listed["captions"]) == (4, 3)
    until_done(studio)
    for kind in ("thumbs", "images"):
        answer = robot.get(f"/api/datasets/robot/{kind}/photo")
        assert answer.headers["content-type"] == "image/webp"
    assert robot.get("/api/datasets/robot/thumbs/README").status_code == 422
    assert robot.delete("/api/datasets/robot/images/README").status_code == 415
    assert put(robot, "more", picture()).status_code == 201
    assert put(robot, "notes", b"text").status_code == 415

    # The first edit writes a file, which counts more; without it, the table counts again.
    assert caption(robot, "photo", "TOK, edited", "none").json()["caption_source"] is None
    assert (place / "photo.txt").read_text() == "TOK, edited"
    assert rows(robot)["photo"]["caption"] == "TOK, edited"
    again = caption(robot, "photo", "").json()
    assert (again["caption"], again["default_caption"]) == ("TOK, photo", False)
    robot.delete("/api/datasets/robot/images/c.png")
    assert not (place / "c.caption").exists()


def test_names_of_images_are_text(robot: TestClient) -> None:
    name = "<img src=x>&'.png"
    assert put(robot, name.replace("<", "%3C").replace(">", "%3E")).status_code == 201
    answer = robot.get("/api/datasets/robot")
    assert answer.headers["content-type"] == "application/json"
    assert re.search("<img src=x>", answer.text)


@pytest.mark.parametrize(
    "name",
    ["caf\u0065\u0301.png", "10:30.png", f"{'a' * 200}.png", " a.png", "con.png", "a./b .png"],
)
def test_a_file_of_another_program_is_used_by_its_own_name(
    robot: TestClient, studio: Studio, name: str
) -> None:
    path = studio.datasets / "robot" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture())
    address = quote(next(iter(rows(robot))), safe="")
    until_done(studio)
    assert robot.get(f"/api/datasets/robot/thumbs/{address}").status_code == 200
    assert caption(robot, address, "TOK outside").status_code == 200
    assert path.with_suffix(".txt").read_text() == "TOK outside"
    assert put(robot, address).status_code == 409
    assert put(robot, address, picture(32, 32), "?replace=1").status_code == 201
    assert list(rows(robot)) == [name] and rows(robot)[name]["width"] == 32
    trash = robot.delete(f"/api/datasets/robot/images/{address}").json()["trash"]
    assert not path.exists() and not path.with_suffix(".txt").exists()
    robot.post(f"/api/trash/{trash}/restore")
    assert rows(robot)[name]["caption"] == "TOK outside"


def test_datasets_of_another_folder_are_beside_those_of_the_studio(tmp_path: Path) -> None:
    more = tmp_path / "mine"
    for name in ("robot", "my:fox.zip"):
        (more / name).mkdir(parents=True)
        (more / name / "a.png").write_bytes(picture())
    studio = Studio(tmp_path / "studio", more)
    with TestClient(application(studio), "http://127.0.0.1", headers={"X-Studio": "1"}) as client:
        assert client.post("/api/datasets", json={"name": "robot"}).status_code == 409
        client.post("/api/datasets", json={"name": "own"})
        found = client.get("/api/datasets").json()["datasets"]
        assert [each["name"] for each in found] == ["my:fox.zip", "own", "robot"]
        assert client.get("/api/datasets/my:fox.zip").json()["images"][0]["name"] == "a.png"
        assert client.get("/api/datasets/my:fox.zip/zip").content.startswith(b"PK")
        chosen = [{"name": "my:fox.zip", "token": "<zwx>"}]
        body = {"datasets": chosen, "settings": SHORT, "key": "k"}
        client.put("/api/queue", json={"held": True})
        run = client.post("/api/runs", json=body).json()["id"]
        assert (studio.outputs / run / "dataset/my:fox.zip/a.png").is_file()
        assert client.patch("/api/datasets/robot", json={"name": "own"}).status_code == 409
        client.patch("/api/datasets/robot", json={"name": "new"})
        assert (more / "new/a.png").is_file()
        trash = client.delete("/api/datasets/new").json()["trash"]
        client.post(f"/api/trash/{trash}/restore")
        assert (more / "new/a.png").is_file()
    forget(studio)
