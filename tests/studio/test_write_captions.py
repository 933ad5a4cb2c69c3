"""Captions by a model that sees images: saved as they come, cancelled, continued, undone."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_gpu
from pages import Page, until
from PIL import Image

from families.captioners import ON_CPU
from families.gpu_lock import GpuLock
from trainer.captions import caption_dataset
from trainer.data import DatasetError

pytestmark = pytest.mark.usefixtures("small_generator")


@pytest.fixture
def folder(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of four images: with a caption by hand, by another program, and two without."""
    place = page.folder / "datasets/robot"
    place.mkdir()
    for name, green in {"a": 90, "b": 100, "c": 110, "d": 20}.items():
        Image.new("RGB", (64, 48), (200, green, 90)).save(place / f"{name}.png")
    (place / "a.txt").write_text("TOK by hand")
    (place / "b.caption").write_text("TOK, of another program")
    (tmp_path / "models" / ON_CPU.hub_id).mkdir(parents=True)
    monkeypatch.setenv("MODEL_VAULT", str(tmp_path / "models"))
    monkeypatch.setenv("SMALL_CAPTIONER", str(tmp_path))
    return place


def start(page: Page, expect: int = 202, **body: Any) -> Any:
    answer = page.client.post("/api/datasets/robot/caption", json=body)
    assert answer.status_code == expect, answer.text
    return answer.json()


def task(page: Page) -> Any:
    tasks = page.client.get("/api/status").json()["tasks"]
    return next((each for each in tasks if each["kind"] == "captions"), None)


def ended(page: Page) -> Any:
    until(lambda: task(page)["state"] not in ("waiting", "running"))
    return task(page)


def texts(folder: Path) -> dict[str, str]:
    return {each.name: each.read_text() for each in folder.glob("[a-e].*") if each.suffix != ".png"}


def test_only_missing_captions_are_written_and_undone_in_one_step(page: Page, folder: Path) -> None:
    before = texts(folder)
    undo = start(page)["task"]
    job = ended(page)
    assert (job["state"], job["written"], job["marked"]) == ("done", 2, 1)
    assert job["avoided"] == ["robot", "red", "round head"]
    caption = "TOK stands at the sea near 200 lamps and 110 birds, seen from afar\n"
    assert texts(folder) == before | {"c.txt": caption, "d.txt": "TOK beside a small blue cup\n"}
    rows = {each["name"]: each for each in page.client.get("/api/datasets/robot").json()["images"]}
    assert rows["b.png"]["caption_source"] == "b.caption"
    marks = {name: " ".join(each["text"] for each in row["marks"]) for name, row in rows.items()}
    assert "look at its caption; the answer was wrong twice: it mentioned" in marks["d.png"]
    assert "wrong twice" not in marks["c.png"]
    assert page.client.post("/api/datasets/robot/undo", json={"undo": undo}).json() == {"undone": 2}
    assert texts(folder) == before and task(page) is None


def test_all_captions_are_replaced_only_if_asked_except_what_is_edited_meanwhile(
    page: Page, folder: Path, tmp_path: Path
) -> None:
    before = texts(folder)
    (tmp_path / "slow").touch()
    undo = start(page, all=True)["task"]
    assert "being written" in start(page, 409)["error"]
    assert page.client.delete("/api/datasets/robot").status_code == 409
    until(lambda: task(page)["written"])
    headers = {"If-Match": "none"}
    path = "/api/datasets/robot/captions/d.png"
    assert page.client.put(path, content=b"TOK, edited", headers=headers).status_code == 200
    page.client.post("/api/datasets/robot/caption/cancel")
    job = ended(page)
    assert job["state"] == "canceled" and 0 < job["written"] < 4
    first = (folder / "a.txt").read_text()
    assert first.startswith("TOK stands at the sea")

    # The next one continues: nothing is asked twice, and an answer that was not saved is now.
    (tmp_path / "slow").unlink()
    start(page, all=True)
    assert ended(page)["state"] == "done"
    log = [json.loads(line) for line in (folder / ".captions.jsonl").read_text().splitlines()]
    assert sorted(each["image"] for each in log if "image" in each) == [f"{n}.png" for n in "abcd"]
    assert texts(folder)["b.txt"].startswith("TOK stands") and "b.caption" in texts(folder)
    assert texts(folder)["d.txt"].startswith("TOK beside")
    again = page.client.post("/api/datasets/robot/undo", json={"undo": task(page)["id"]})
    assert again.status_code == 200 and texts(folder)["d.txt"] == "TOK, edited"
    assert page.client.post("/api/datasets/robot/undo", json={"undo": undo}).status_code == 200
    assert texts(folder) == before | {"d.txt": "TOK, edited"}


def test_captions_wait_for_the_gpu_and_have_it_until_they_are_written(
    page: Page, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_GPU", "1")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    lock = GpuLock(small_gpu.UUID, "run", "one")
    assert lock.take()
    (tmp_path / "models/Qwen/Qwen3-VL-4B-Instruct").mkdir()
    (tmp_path / "slow").touch()
    start(page)
    until(lambda: task(page)["waits_for"] == "one")
    lock.release()
    until(lambda: task(page)["state"] == "running" and task(page)["of"])
    owner = page.client.get("/api/status").json()["gpu"]["owner"]
    assert owner == {"kind": "other", "id": "the captions of robot"}
    refused = page.client.post("/api/images", json={"prompt": "a dog"})
    assert refused.json()["error"] == "the GPU is in use by the captions of robot"
    assert ended(page)["model"] == "qwen3-vl-4b"
    assert page.client.get("/api/status").json()["gpu"]["owner"] is None


def test_what_cannot_be_written_is_said_in_the_words_of_the_command(
    page: Page, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(page, 422, kind="robot", style=True)["field"] == "kind"
    assert start(page, 422, avoid="x" * 1001)["field"] == "avoid"
    assert start(page, 422, model="/etc")["field"] == "model"
    (folder / "e.png").write_bytes(b"\x89PNG nothing")
    start(page)
    job = ended(page)
    with pytest.raises(DatasetError) as refused:  # what the command prints
        caption_dataset(folder, model="qwen3-vl-2b")
    assert (job["state"], job["error"]) == ("failed", str(refused.value))

    monkeypatch.setenv("MODEL_VAULT", str(tmp_path))
    models = page.client.get("/api/captioners?base=qwen-image").json()["models"]
    assert [(each["name"], each["here"]) for each in models][0] == (
        "the text encoder of qwen-image",
        False,
    )
    assert "qwen3-vl-2b is not on this machine" in start(page, 422)["error"]
