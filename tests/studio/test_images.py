"""Jobs of images: grids, cancelling, a process that dies, and a run that generates."""

import json
from pathlib import Path
from typing import Any

import pytest
from pages import Page, Server, until, with_dataset
from PIL import Image

from studio.folder import Studio
from studio.generator import ENDED, generator_of

pytestmark = pytest.mark.usefixtures("small_generator")


def make(page: Page, expect: int = 202, **body: Any) -> Any:
    answer = page.client.post("/api/images", json={"prompt": "a dog", "seed": 5} | body)
    assert answer.status_code == expect, answer.text
    return answer.json()["id"] if expect == 202 else answer.json()


def ended(page: Page, job: str) -> Any:
    def look() -> Any:
        found = page.client.get(f"/api/images/{job}").json()
        return found if found["state"] in ENDED else None

    return until(look)


def weights(page: Page, run: str = "one") -> str:
    folder = page.folder / "outputs" / run
    (folder / "checkpoints").mkdir(parents=True)
    for step in (100, 200):
        (folder / "checkpoints" / f"step-{step:06d}.zip").write_bytes(b"")
    (folder / "weights.zip").write_bytes(b"")
    return f"runs/{run}/final"


def test_a_grid_has_an_image_for_each_cell_with_its_settings(page: Page) -> None:
    chosen = [{"id": weights(page), "scale": 1.0}]
    axes = [{"name": "scale", "values": [0.5, 1]}, {"name": "checkpoint", "values": [100, "final"]}]
    job = ended(page, make(page, weights=chosen, axes=axes))
    assert (job["state"], job["done"], job["of"]) == ("done", 4, 4)
    cells = [(i["row"], i["column"], i["settings"]["weights"][0]) for i in job["images"]]
    first = "runs/one/checkpoint-000100"
    assert cells[:2] == [(0, 0, {"id": first, "scale": 0.5}), (0, 1, {"id": first, "scale": 1})]
    assert cells[3] == (1, 1, {"id": "runs/one/final", "scale": 1})
    assert {each["seed"] for each in job["images"]} == {5}
    assert page.client.get(job["images"][0]["file"]).content == b"image"


def test_several_images_have_consecutive_seeds_and_are_listed_newest_first(page: Page) -> None:
    first = ended(page, make(page, count=3))
    assert [each["seed"] for each in first["images"]] == [5, 6, 7]
    second = make(page)
    ended(page, second)
    found = page.client.get("/api/images?limit=1").json()
    assert [each["id"] for each in found["jobs"]] == [second] and found["more"]
    trash = page.client.delete(f"/api/images/{second}").json()["trash"]
    assert page.client.get(f"/api/images/{second}").status_code == 404
    page.client.post(f"/api/trash/{trash}/restore")
    assert page.client.get(f"/api/images/{second}").json()["done"] == 1


def test_a_single_image_is_moved_to_the_trash_and_back(page: Page) -> None:
    job = ended(page, make(page, count=3))
    trash = page.client.delete(job["images"][1]["file"]).json()["trash"]
    left = page.client.get(f"/api/images/{job['id']}").json()["images"]
    assert [each["number"] for each in left] == [1, 3]
    assert page.client.delete(job["images"][1]["file"]).status_code == 404
    whole = page.client.delete(f"/api/images/{job['id']}").json()["trash"]
    assert page.client.post(f"/api/trash/{trash}/restore").status_code == 409  # its job first
    page.client.post(f"/api/trash/{whole}/restore")
    page.client.post(f"/api/trash/{trash}/restore")
    assert page.client.get(f"/api/images/{job['id']}").json()["images"] == job["images"]


def test_a_cancelled_job_keeps_the_images_that_are_done(page: Page) -> None:
    job, waiting = make(page, prompt="slow", count=20), make(page)
    until(lambda: page.client.get(f"/api/images/{job}").json()["done"])
    assert page.client.delete(f"/api/images/{job}").status_code == 409
    page.client.post(f"/api/images/{job}/cancel")
    found = ended(page, job)
    assert found["state"] == "canceled" and 0 < found["done"] < 20
    assert ended(page, waiting)["state"] == "done"


def test_a_process_that_dies_fails_its_job_and_the_next_one_is_done(page: Page) -> None:
    job = ended(page, make(page, prompt="crash", count=3))
    assert (job["state"], job["done"]) == ("failed", 1)
    assert "signal 9" in job["error"]
    assert ended(page, make(page))["state"] == "done"


def test_a_job_of_a_server_that_was_ended_is_not_said_to_run(page: Page) -> None:
    job = make(page, prompt="slow", count=20)
    until(lambda: page.client.get(f"/api/images/{job}").json()["done"])
    page.end()
    page.start()
    found = page.client.get(f"/api/images/{job}").json()
    assert found["state"] in ("failed", "canceled") and found["done"] >= 1


def test_a_run_generates_between_two_of_its_steps(page: Page) -> None:
    make(page, expect=409, when="by_run")
    run = page.new(steps=1000)
    until(lambda: page.run(run)["step"])
    axes = [{"name": "scale", "values": [0.5, 1]}]
    own = [{"id": weights(page), "scale": 1.0}]
    assert make(page, 422, when="by_run", weights=own, axes=axes)["field"] == "axes"
    asked = {"when": "by_run", "count": 2, "prompt": "<zwx> on a beach", "weights": own}
    job = ended(page, make(page, **asked, width=512, height=512, steps=50))
    assert (job["state"], job["done"], job["run"]) == ("done", 2, run)
    facts = json.loads(next((page.folder / "outputs" / "images").rglob("0001.json")).read_text())
    assert facts["prompt"] == "<zwx> on a beach" and facts["step"] > 0
    used = {"width": 64, "height": 48, "steps": 8, "guidance": 1.0, "base_model": "miniature-turbo"}
    used["weights"] = [{"id": f"runs/{run}/step-{facts['step']:06d}", "scale": 0.75}]
    for shown in (facts, job["images"][0]["settings"]):
        assert {name: shown[name] for name in used} == used
    assert job["settings"]["steps"] == 8 and [each["seed"] for each in job["images"]] == [5, 6]
    assert page.run(run)["state"] == "running"


def test_the_generator_is_released(page: Page) -> None:
    ended(page, make(page))
    process = generator_of(Studio(page.folder)).worker._process
    assert process is not None
    ready = {"state": "ready", "base_model": "miniature-turbo"}
    assert page.client.get("/api/status").json()["generator"] == ready
    assert page.client.post("/api/gpu/release").json() == {"released": True}
    until(lambda: process.returncode is not None)
    assert page.client.get("/api/status").json()["generator"]["state"] == "off"


def test_what_cannot_be_generated_is_refused_at_its_field(page: Page) -> None:
    for body, status, field in (
        ({"prompt": " "}, 422, "prompt"),
        ({"width": 8, "height": 64}, 422, "width"),
        ({"steps": 1000}, 422, "steps"),
        ({"count": 65}, 422, "count"),
        ({"base_model": "/etc"}, 422, "base_model"),
        ({"axes": [{"name": "scale", "values": [1]}]}, 422, "axes"),
        ({"axes": [{"name": "seed", "values": list(range(65))}]}, 422, "axes"),
        ({"weights": [{"id": "uploads/../../etc/passwd"}]}, 404, None),
        ({"weights": [{"id": "runs/one/../x"}]}, 404, None),
        ({"weights": [{"id": "runs/.../final"}]}, 400, "name"),
    ):
        found = make(page, expect=status, **body)
        assert found.get("field") == field, (body, found)
    assert not (page.folder / "outputs" / "images").exists()


@pytest.mark.slow
def test_images_of_the_miniature_have_their_settings_in_the_file(tmp_path: Path) -> None:
    server = Server(with_dataset(tmp_path))
    try:
        size = {"width": 64, "height": 64, "steps": 2}
        job = server.post("/api/images", prompt="a red circle", seed=3, count=2, **size)["id"]
        until(lambda: server.get(f"/api/images/{job}")["done"] == 2, 120)
        path = next((tmp_path / "outputs" / "images").rglob("0002.png"))
        with Image.open(path) as image:
            facts = json.loads(image.info["zeroprior"])
        assert (facts["seed"], facts["prompt"], facts["steps"]) == (4, "a red circle", 2)
        assert json.loads(path.with_suffix(".json").read_text())["seed"] == 4
    finally:
        server.stop()
