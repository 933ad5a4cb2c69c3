"""Datasets on the page: images, captions, archives."""

import io
import json
import os
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from families.registry import BASES
from studio import uploads
from studio.app import application
from studio.folder import Studio

HERE = {"X-Studio": "1"}


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.fixture
def page(studio: Studio) -> Iterator[TestClient]:
    with TestClient(application(studio), "http://127.0.0.1:8500", headers=HERE) as client:
        client.post("/api/datasets", json={"name": "robot"})
        yield client


def picture(width: int = 64, height: int = 48, shade: int = 90) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 20, 200)).save(file, "PNG")
    return file.getvalue()


def put(page: TestClient, name: str, content: bytes | None = None, query: str = "") -> Any:
    path = f"/api/datasets/robot/images/{name}{query}"
    return page.put(path, content=picture() if content is None else content)


def caption(page: TestClient, name: str, text: str, version: str = "*") -> Any:
    path = f"/api/datasets/robot/captions/{name}"
    return page.put(path, content=text.encode(), headers={"If-Match": version})


def rows(page: TestClient, query: str = "") -> dict[str, Any]:
    found = page.get(f"/api/datasets/robot{query}").json()
    return {row["name"]: row for row in found["images"]}


def files(studio: Studio) -> list[str]:
    place = studio.datasets / "robot"
    return sorted(e.relative_to(place).as_posix() for e in place.rglob("*") if e.is_file())


def until_done(studio: Studio) -> dict[str, Any]:
    for _ in range(300):
        if all(each["state"] not in ("waiting", "running") for each in studio.tasks.shown()):
            break
        time.sleep(0.02)
    return studio.tasks.shown()[-1]


def test_an_uploaded_image_has_size_thumbnail_and_default_caption(
    page: TestClient, studio: Studio
) -> None:
    answer = put(page, "a b.png", picture(640, 400))
    assert answer.status_code == 201
    row = rows(page)["a b.png"]
    assert (row["width"], row["height"]) == (640, 400)
    assert row["caption"] == "a photo of TOK" and row["default_caption"]
    assert row["version"] == answer.json()["version"]
    assert len(list((studio.datasets / "robot/.studio/thumbs").iterdir())) == 1
    small = page.get(f"/api/datasets/robot/thumbs/a b.png?v={row['version']}")
    assert "immutable" in small.headers["cache-control"]
    assert Image.open(io.BytesIO(small.content)).size == (320, 200)
    whole = page.get("/api/datasets/robot/images/a b.png")
    assert whole.content == picture(640, 400) and whole.headers["content-type"] == "image/png"
    assert page.get("/api/datasets").json()["datasets"][0]["images"] == 1


def test_an_image_is_replaced_only_when_asked_and_the_old_one_can_be_restored(
    page: TestClient, studio: Studio
) -> None:
    put(page, "a.png")
    assert put(page, "a.png", picture(32, 32)).status_code == 409
    assert put(page, "a.png", picture(32, 32), "?replace=1").status_code == 201
    assert rows(page)["a.png"]["width"] == 32
    assert len(list(studio.trash.iterdir())) == 1


def test_a_removed_image_takes_its_caption_with_it_and_comes_back(
    page: TestClient, studio: Studio
) -> None:
    put(page, "a.png")
    caption(page, "a.png", "TOK outside")
    trash = page.delete("/api/datasets/robot/images/a.png").json()["trash"]
    assert not any(name.startswith("a.") for name in files(studio))
    assert page.post(f"/api/trash/{trash}/restore").status_code == 200
    assert rows(page)["a.png"]["caption"] == "TOK outside"


def test_a_dataset_is_renamed_deleted_and_restored(page: TestClient) -> None:
    put(page, "a.png")
    assert page.post("/api/datasets", json={"name": "robot"}).status_code == 409
    assert page.patch("/api/datasets/robot", json={"name": "Roboter ü"}).status_code == 200
    trash = page.delete("/api/datasets/Roboter ü").json()["trash"]
    assert page.get("/api/datasets").json() == {"datasets": []}
    page.post(f"/api/trash/{trash}/restore")
    assert page.get("/api/datasets/Roboter ü").json()["images"][0]["name"] == "a.png"


def test_bad_uploads_leave_nothing(page: TestClient, studio: Studio) -> None:
    before = files(studio)
    assert put(page, "a.svg").status_code == 415
    assert put(page, "a.png", b"not an image").status_code == 422
    assert put(page, "a.png", picture()[:60]).status_code == 422
    assert "too small" in put(page, "a.png", picture(4, 4)).json()["error"]
    big = {"Content-Length": str(5 << 30)}
    for path in ("images/a.png", "archives/a.zip"):
        answer = page.put(f"/api/datasets/robot/{path}", content=b"x", headers=big)
        assert answer.status_code == 413
    answer = page.put(
        "/api/datasets/robot/captions/a.png", content=b"x", headers={**big, "If-Match": "*"}
    )
    assert answer.status_code == 413
    assert files(studio) == before


def test_a_body_that_grows_beyond_the_limit_is_refused(
    page: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_MEMBER_BYTES", 1000)

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(100)

    answer = page.put("/api/datasets/robot/images/a.png", content=chunks())
    assert answer.status_code == 413
    assert files(studio) == []


def test_a_full_disk_is_said_before_anything_is_written(
    page: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(studio.folder)
    values = list(real)
    values[4] = 10  # free blocks
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(values))
    answer = put(page, "a.png")
    assert answer.status_code == 507 and "free disk space" in answer.json()["what_to_do"]
    assert files(studio) == []


def test_two_tabs_never_lose_a_caption(page: TestClient) -> None:
    put(page, "a.png")
    first = caption(page, "a.png", "TOK\nin two lines", "none").json()
    assert rows(page)["a.png"]["caption"] == "TOK\nin two lines"
    assert caption(page, "a.png", "TOK, mine", first["caption_version"]).status_code == 200
    answer = caption(page, "a.png", "TOK, theirs", first["caption_version"])
    assert answer.status_code == 412
    both = answer.json()
    assert (both["mine"], both["theirs"]) == ("TOK, theirs", "TOK, mine")
    assert caption(page, "a.png", "TOK, both", both["caption_version"]).status_code == 200
    assert rows(page)["a.png"]["caption"] == "TOK, both"


def test_two_tabs_cannot_both_write_the_first_caption(page: TestClient) -> None:
    put(page, "a.png")
    version = rows(page)["a.png"]["caption_version"]
    assert caption(page, "a.png", "TOK, mine", version).status_code == 200
    assert caption(page, "a.png", "TOK, theirs", version).status_code == 412


def test_a_caption_file_finds_its_image_by_name(page: TestClient) -> None:
    put(page, "a.png")
    assert caption(page, "a.txt", "TOK outside").status_code == 200
    assert rows(page)["a.png"]["caption"] == "TOK outside"
    assert caption(page, "b.txt", "TOK").status_code == 404
    assert caption(page, "b.png", "TOK").status_code == 404


def test_an_empty_caption_is_the_default_one(page: TestClient, studio: Studio) -> None:
    put(page, "a.png")
    caption(page, "a.png", "TOK")
    answer = caption(page, "a.png", " ").json()
    assert answer["default_caption"] and answer["caption_version"] == "none"
    assert "a.txt" not in files(studio)


def test_500_captions_are_replaced_in_a_second_and_undone_as_a_whole(
    page: TestClient, studio: Studio
) -> None:
    place = studio.datasets / "robot"
    texts = {f"{number:03d}": f"TOK in red, red {number}" for number in range(500)}
    for name, text in texts.items():
        (place / f"{name}.png").write_bytes(picture(8, 8))
        (place / f"{name}.txt").write_text(text)
    asked = {"find": "red", "with": "blue", "word": True, "dry_run": True}
    shown = page.post("/api/datasets/robot/replace", json=asked).json()
    assert len(shown["changes"]) == 500 and shown["undo"] is None
    assert shown["changes"][7]["after"] == "TOK in blue, blue 7"
    assert (place / "007.txt").read_text() == texts["007"]
    start = time.perf_counter()
    done = page.post("/api/datasets/robot/replace", json=asked | {"dry_run": False}).json()
    assert time.perf_counter() - start < 3  # one second on a machine that does nothing else
    assert (place / "499.txt").read_text() == "TOK in blue, blue 499"
    undo = {"undo": done["undo"]}
    caption(page, "003.png", "TOK by hand")
    refused = page.post("/api/datasets/robot/undo", json=undo)
    assert refused.status_code == 409 and "003.png" in refused.json()["error"]
    caption(page, "003.png", "TOK in blue, blue 3")
    assert page.post("/api/datasets/robot/undo", json=undo).json() == {"undone": 500}
    assert {each.stem: each.read_text() for each in place.glob("*.txt")} == texts


def test_regular_expressions_are_checked_and_bounded(
    page: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(page, "a.png")
    caption(page, "a.png", "TOK aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
    monkeypatch.setattr("studio.substitution.SECONDS", 1)

    def replace(find: str, text: str) -> Any:
        asked = {"find": find, "with": text, "regex": True, "dry_run": True}
        return page.post("/api/datasets/robot/replace", json=asked)

    assert replace("(T)(O)", r"\2\1").json()["changes"][0]["after"].startswith("OTK")
    assert "invalid" in replace("(", "").json()["error"]
    assert "invalid" in replace("T", r"\9").json()["error"]
    assert "longer than" in replace("(a+)+$", "").json()["error"]


def test_what_the_trainer_says_is_beside_the_image(page: TestClient, studio: Studio) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(page, name, picture(100, 60))
    caption(page, "a.png", "TOK outside")
    answer = caption(page, "b.png", "a robot, <lora:x:1>")
    (studio.datasets / "robot/d.jpg").write_bytes(b"nothing")
    (studio.datasets / "robot/orphan.txt").write_text("TOK")
    page.get("/api/datasets/robot")
    until_done(studio)
    found = page.get("/api/datasets/robot?base=z-image-turbo&resolution=512").json()
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


def test_buckets_of_a_base_have_its_multiple(page: TestClient) -> None:
    put(page, "a.png", picture(400, 300))
    row = rows(page, "?base=miniature-turbo")["a.png"]
    assert (row["bucket"]["width"], row["bucket"]["height"]) == (72, 56)
    for base in BASES.values():
        if base.included is not None and (base.included / "vae").is_dir():
            config = json.loads((base.included / "vae/config.json").read_text())
            assert base.size_multiple == 2 ** len(config["block_out_channels"])  # patches of 2


def packed(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_an_archive_adds_images_and_captions_without_its_outer_folder(
    page: TestClient, studio: Studio
) -> None:
    content = packed({"my dog/a.png": picture(), "my dog/a.txt": b"TOK", "my dog/x.pdf": b"%PDF"})
    answer = page.put("/api/datasets/robot/archives/dog.zip", content=content)
    assert answer.status_code == 202
    task = until_done(studio)
    assert (task["id"], task["state"], task["done"], task["of"]) == (
        answer.json()["task"],
        "done",
        1,
        1,
    )
    assert rows(page)["a.png"]["caption"] == "TOK"
    parts = studio.datasets / "robot/.studio/parts"
    assert list(parts.iterdir()) == []
    zipped = zipfile.ZipFile(io.BytesIO(page.get("/api/datasets/robot.zip").content))
    assert zipped.namelist() == ["a.png", "a.txt"] and zipped.read("a.txt") == b"TOK"


def test_captions_of_other_programs_and_images_of_phones_are_shown(
    page: TestClient, studio: Studio
) -> None:
    heic = (Path(__file__).parents[1] / "trainer/data/images/upright.heic").read_bytes()
    table = b'{"file_name": "a.png", "text": "TOK in a table"}\n' + b" " * 99
    members = {"a.png": picture(), "b.png": picture(), "b.caption": b"TOK beside"}
    members |= {"c.HEIC": heic, "metadata.jsonl": table}
    page.put("/api/datasets/robot/archives/a.zip", content=packed(members))
    assert until_done(studio)["state"] == "done"
    found = rows(page)
    captions = ["TOK in a table", "TOK beside", "a photo of TOK"]
    assert [each["caption"] for each in found.values()] == captions
    assert [each["default_caption"] for each in found.values()] == [False, False, True]
    assert found["c.HEIC"]["trained"] and found["c.HEIC"]["width"] == 64
    shown = page.get("/api/datasets/robot/images/c.HEIC")
    assert shown.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(shown.content)).size == (64, 32)
    assert caption(page, "a.png", "TOK written here", "none").status_code == 200
    assert rows(page)["a.png"]["caption"] == "TOK written here"


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
    page: TestClient, studio: Studio, members: dict[str, bytes], error: str
) -> None:
    put(page, "there.png")
    before = files(studio)
    page.put("/api/datasets/robot/archives/a.zip", content=packed(members))
    task = until_done(studio)
    assert task["state"] == "failed" and error in task["error"]
    assert files(studio) == before


def test_a_damaged_archive_adds_nothing(page: TestClient, studio: Studio) -> None:
    content = packed({f"{number}.png": os.urandom(5000) for number in range(9)})
    page.put("/api/datasets/robot/archives/a.zip", content=content[:20000])
    assert until_done(studio)["state"] == "failed"
    assert files(studio) == []
    answer = page.put("/api/datasets/robot/archives/a.zip", content=b"hello")
    assert answer.status_code == 415


def test_parts_of_a_killed_server_are_removed_at_the_start(tmp_path: Path) -> None:
    parts = tmp_path / "datasets/robot/.studio/parts"
    parts.mkdir(parents=True)
    (parts / "0.part").write_bytes(b"half")
    with TestClient(application(Studio(tmp_path)), "http://127.0.0.1"):
        assert not parts.exists()


def test_images_in_folders_and_of_the_user_are_found(page: TestClient, studio: Studio) -> None:
    place = studio.datasets / "robot/fox"
    place.mkdir()
    (place / "1.png").write_bytes(picture())
    (place / "1.txt").write_text("TOK runs")
    assert rows(page)["fox/1.png"]["caption"] == "TOK runs"
    until_done(studio)
    assert page.get("/api/datasets/robot/thumbs/fox%2F1.png").status_code == 200
    assert caption(page, "fox%2F1.png", "TOK sits").status_code == 200
    assert (place / "1.txt").read_text() == "TOK sits"


def test_names_of_images_are_text(page: TestClient) -> None:
    name = "<img src=x>&'.png"
    assert put(page, name.replace("<", "%3C").replace(">", "%3E")).status_code == 201
    answer = page.get("/api/datasets/robot")
    assert answer.headers["content-type"] == "application/json"
    assert re.search("<img src=x>", answer.text)
